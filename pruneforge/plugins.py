"""Discovery of plugins: installed ones, single files, and what the user blocked."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from pruneforge.documents import regular_file
from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces import hookspecs
from pruneforge.interfaces.options import Configurable, describe_options
from pruneforge.interfaces.registry import KINDS, Entry, Registry, imported

GROUP = "pruneforge"
"""The entry-point group, the same for first-party and third-party plugins."""

DISTRIBUTION = "pruneforge-lab"
"""What this project is called on the package index, where `pruneforge` is somebody else's."""

VARIABLE = "PRUNEFORGE_PLUGINS"
"""Limits discovery: `a,b` loads only those, `-a,-b` all but those, the empty text none."""


@dataclass(frozen=True)
class Plugin:
    """One discovered plugin.

    Attributes:
        name: Entry-point name, or the file's path.
        origin: Distribution name, or the file's path.
        version: Version of the distribution; empty for a file.
        from_file: Whether it was loaded with `-p` from a single file.
        error: Traceback when it failed to load, else `None`.
    """

    name: str
    origin: str
    version: str
    error: str | None = None
    from_file: bool = False


class Plugins:
    """The plugins of this process: what each registered, and the hooks that observe a run.

    Attributes:
        registry: Everything registered, by kind and name.
        loaded: The plugins in the order they were discovered, failed ones included.
        hook: pluggy's relay; `hook.pruneforge_run_started(run=...)` calls every plugin's hook.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("pruneforge")
        self._manager.add_hookspecs(hookspecs)
        self.hook = self._manager.hook
        self.registry = Registry()
        self.loaded: list[Plugin] = []

    def load_installed(self, selection: str | None = None) -> None:
        """Load the plugins of all installed distributions that `selection` admits.

        Args:
            selection: The syntax of `PRUNEFORGE_PLUGINS`; `None` admits all.

        Raises:
            PruneForgeError: `selection` names a plugin that is not installed, or mixes both forms.
        """
        points = metadata.entry_points(group=GROUP)
        admitted = _admitted(selection, {point.name for point in points})
        for point in sorted(points, key=lambda point: point.name):
            if point.name in admitted:
                origin = point.dist.name if point.dist else point.value
                version = point.dist.version if point.dist else ""
                self._load(point.name, origin, version, point.load)

    def load_file(self, path: str | Path) -> None:
        """Load a single Python file as a plugin; loading the same file again does nothing.

        A file that implements no `pruneforge_register` registers every class of these kinds that it
        defines under the class's name in lower case.

        Raises:
            PruneForgeError: The file does not exist, or fails to load.
        """
        file = regular_file(Path(path), "plugin file")
        origin = str(file)
        if any(plugin.origin == origin for plugin in self.loaded):
            return
        self._load(origin, origin, "", lambda: _import_file(file), from_file=True)
        error = self.loaded[-1].error
        if error is not None:
            raise PruneForgeError(f"plugin file {origin!r} failed to load: {error.strip().splitlines()[-1]}")

    def describe(self, *names: str) -> list[dict[str, Any]]:
        """Return what is registered, all or by name, as JSON types.

        Each with its options, or why it cannot be imported, and what it lacks to be used.
        """
        entries = (entry for kind in KINDS for entry in self.registry.entries(kind))
        return [_described(entry) for entry in entries if not names or entry.name in names]

    def register(self, hooks: object) -> None:
        """Add an object whose methods implement hooks, for observing runs from Python."""
        self._manager.register(hooks)

    def unregister(self, hooks: object) -> None:
        """Remove an object that `register` added."""
        self._manager.unregister(hooks)

    def _load(self, name: str, origin: str, version: str, load: object, from_file: bool = False) -> None:
        # A plugin may fail in any way at all; it is reported, and the others go on working.
        if self._manager.has_plugin(name):
            taken = next(plugin.origin for plugin in self.loaded if plugin.name == name)
            self.loaded.append(
                Plugin(name, origin, version, f"the name is taken by the plugin of {taken!r}", from_file)
            )
            return
        try:
            module = load()  # type: ignore[operator]
            self._manager.register(module, name)
            self.registry.plugin = name
            self.registry.distribution = origin if version else ""  # a single file has none
            if hasattr(module, "pruneforge_register"):
                module.pruneforge_register(self.registry)
            else:
                _register_classes(module, self.registry)
        except (Exception, SystemExit):
            self.registry.drop(name)
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self.loaded.append(Plugin(name, origin, version, traceback.format_exc(), from_file))
        else:
            self.loaded.append(Plugin(name, origin, version, None, from_file))
        finally:
            self.registry.plugin, self.registry.distribution = "python", ""


def _described(entry: Entry) -> dict[str, Any]:
    item: dict[str, Any] = {"kind": entry.kind, "name": entry.name, "plugin": entry.plugin, "error": None}
    item["lacking"] = entry.lacking()
    try:
        cls = entry.load()
    except PruneForgeError as error:
        text = str(error)
        unknown: dict[str, Any] = {
            "summary": f"cannot be imported: {text}",
            "description": "",
            "argument": None,
            "options": [],
        }
        return item | unknown | {"error": text}
    description = inspect.getdoc(cls) or ""
    said = {"summary": description.partition("\n")[0], "description": description, "argument": cls.argument}
    return item | said | {"options": describe_options(cls)}


def _admitted(selection: str | None, installed: Iterable[str]) -> list[str]:
    names = sorted(installed)
    if selection is None:
        return names
    wanted = [part.strip() for part in selection.split(",") if part.strip()]
    blocked = [part[1:] for part in wanted if part.startswith("-")]
    if blocked and len(blocked) != len(wanted):
        raise PruneForgeError(f"{VARIABLE}={selection!r} both names and blocks plugins; do one or the other")
    for name in blocked or wanted:
        if name not in names:
            raise unknown_name(f"plugin in {VARIABLE}", name, names)
    return [name for name in names if (name not in blocked if blocked else name in wanted)]


def _import_file(file: Path) -> ModuleType:
    name = f"pruneforge_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a helper beside it is found and hides nothing
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and pickle look annotations up there
    spec.loader.exec_module(module)
    return module


def _register_classes(module: ModuleType, registry: Registry) -> None:
    bases = {kind: imported(base) for kind, base in KINDS.items()}
    for cls in vars(module).values():
        own = inspect.isclass(cls) and issubclass(cls, Configurable) and cls.__module__ == module.__name__
        for kind, base in bases.items():
            if own and issubclass(cls, base) and not inspect.isabstract(cls):
                getattr(registry, kind)(cls.__name__.lower(), cls)


def check_distribution() -> None:
    """Raise if a distribution called `pruneforge` is installed.

    On the package index that is another project, and version 0.1.0 of this one was called so. Either has the same
    import name, so that its files and this one's overwrite one another.

    Raises:
        PruneForgeError: There is one; the message says how to mend it.
    """
    try:
        version = metadata.version("pruneforge")
    except metadata.PackageNotFoundError:
        return
    raise PruneForgeError(
        f"the distribution 'pruneforge' {version} is installed, which is another project or this one before it was "
        f"called {DISTRIBUTION}; they share files: run pip uninstall pruneforge {DISTRIBUTION}, and install again"
    )


def create(kind: str, spec: str, /, **options: Any) -> Any:
    """Return what is registered under a name, such as the metric that another is built on.

    Args:
        kind: What it is, as the methods of `Registry` are called, such as "metric".
        spec: `name` or `name:argument`.
        options: Its options.

    Raises:
        PruneForgeError: The kind or the name is unknown, or an option is wrong.
    """
    return loaded_plugins().registry.create(kind, spec, options)


@functools.cache
def loaded_plugins() -> Plugins:
    """Return this process's plugins, discovered at the first call as `PRUNEFORGE_PLUGINS` says."""
    check_distribution()
    installed = Plugins()
    installed.load_installed(os.environ.get(VARIABLE))
    return installed
