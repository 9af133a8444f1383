"""What is registered under which name, imported when it is asked for."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.shipped import Shipped, ShippedKind

KINDS = {
    "metric": "pruneforge.interfaces.metric:Metric",
    "adapter": "pruneforge.interfaces.adapter:Adapter",
    "source": "pruneforge.interfaces.source:Source",
    "evaluator": "pruneforge.interfaces.evaluator:Evaluator",
    "demo": "pruneforge.interfaces.demo:Demo",
    "allocator": "pruneforge.interfaces.allocator:Allocator",
    "refiner": "pruneforge.interfaces.refiner:Refiner",
    "recovery": "pruneforge.interfaces.recovery:Recovery",
    "objective": "pruneforge.interfaces.objective:Objective",
    "observer": "pruneforge.interfaces.observer:Observer",
}
"""What a plugin can register, each kind with its base class; a new kind is a line here and a method of `Registry`."""


def plural(kind: str) -> str:
    """Return what several plugins of one kind are called."""
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        kind: One of `KINDS`.
        name: What users call it.
        target: The class, or `"module:Class"` to import it from.
        plugin: Name of the plugin that registered it.
        library: Module that it needs besides, which a plain installation does not bring.
        extra: The extra of the plugin's distribution that brings it.
        distribution: Name of the plugin's distribution.
    """

    kind: str
    name: str
    target: str | type[Configurable]
    plugin: str
    library: str | None = None
    extra: str | None = None
    distribution: str = ""

    def load(self) -> type[Configurable]:
        """Import and return the class, which may describe itself without the library that it needs.

        Raises:
            PruneForgeError: The target cannot be imported, naming the plugin, or what has to be installed for it.
        """
        if not isinstance(self.target, str):
            return self.target
        try:
            return imported(self.target)
        except Exception as error:  # a plugin's module may fail in any way
            raise PruneForgeError(
                self.lacking()
                or f"{self.kind} {self.name!r} of plugin {self.plugin!r} cannot be imported from {self.target}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    @property
    def module(self) -> str:
        """Name of the module that the class is in."""
        return self.target.partition(":")[0] if isinstance(self.target, str) else self.target.__module__

    def summary(self) -> str:
        """Return the first line of the class's own docstring, or why it cannot be imported as far as that shows.

        It is read from the source: importing the class may import libraries that take seconds.
        """
        if not isinstance(self.target, str):
            return (self.target.__doc__ or "").strip().partition("\n")[0]
        module, _, name = self.target.partition(":")
        try:
            spec = importlib.util.find_spec(module)  # imports the packages around the module
            source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
            tree = ast.parse(source)
        except Exception as error:  # a plugin's package may fail in any way
            return f"cannot be imported from {self.target}: {type(error).__name__}: {' '.join(str(error).split())}"
        if name not in source:
            return f"cannot be imported from {self.target}: there is no {name if spec else module}"
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        return next(((ast.get_docstring(node) or "").partition("\n")[0] for node in classes), "")

    def lacking(self) -> str | None:
        """Return that the library is not installed and how to install it, or `None`."""
        if self.library is None or importlib.util.find_spec(self.library.partition(".")[0]) is not None:
            return None
        extra = f"the extra {self.extra!r} of {self.distribution} (in a clone: pip install '.[{self.extra}]')"
        needs = f"{self.kind} {self.name!r} needs {self.library}, which is not installed"
        return f"{needs}; install {extra}" if self.distribution else needs


Registered = TypeVar("Registered", Entry, Shipped)


def _named(kind: str, name: str, among: Mapping[str, Registered]) -> Registered:
    if name not in among:
        raise unknown_name(kind, name, among)
    return among[name]


def imported(target: str) -> Any:
    """Return what `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry:
    """Metrics, allocators, refiners, recoveries, objectives, adapters, sources, evaluators, demos, observers by name.

    Besides these classes a plugin may register files: studies, and published numbers. A plugin fills it in its
    `pruneforge_register` hook. What needs a library that a plain installation of the plugin does not bring is
    registered with `library="module", extra="name"`: the module, and the extra that brings it.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self._files: dict[ShippedKind, dict[str, Shipped]] = {"study": {}, "published": {}}
        self.plugin = "python"
        """Name of the plugin that is registering now."""
        self.distribution = ""
        """Name of its distribution."""

    def metric(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Metric`."""
        self._add("metric", name, target, **needs)

    def adapter(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Adapter`."""
        self._add("adapter", name, target, **needs)

    def source(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Source`."""
        self._add("source", name, target, **needs)

    def evaluator(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Evaluator`."""
        self._add("evaluator", name, target, **needs)

    def demo(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Demo`."""
        self._add("demo", name, target, **needs)

    def allocator(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Allocator`."""
        self._add("allocator", name, target, **needs)

    def refiner(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Refiner`."""
        self._add("refiner", name, target, **needs)

    def recovery(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Recovery`."""
        self._add("recovery", name, target, **needs)

    def objective(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Objective`."""
        self._add("objective", name, target, **needs)

    def study(self, name: str, target: str | Path) -> None:
        """Register a study: a YAML file, as its path or as `"package:path"` of a file in a package."""
        self._place(Shipped("study", name, target, self.plugin), self._files["study"])

    def published(self, target: str | Path) -> None:
        """Register published numbers, which reports show beside measured ones: a YAML file, given as for `study`."""
        self._place(Shipped("published", str(target), target, self.plugin), self._files["published"])

    def observer(self, name: str, target: str | type[Configurable], **needs: str) -> None:
        """Register a `pruneforge.Observer`."""
        self._add("observer", name, target, **needs)

    def _add(
        self,
        kind: str,
        name: str,
        target: str | type[Configurable],
        library: str | None = None,
        extra: str | None = None,
    ) -> None:
        if (library is None) != (extra is None):
            raise PruneForgeError(
                f"{kind} {name!r} of plugin {self.plugin!r} names a library and no extra, or the reverse"
            )
        self._place(Entry(kind, name, target, self.plugin, library, extra, self.distribution), self._entries[kind])

    @staticmethod
    def _place(item: Registered, among: dict[str, Registered]) -> None:
        """Add an item to those of its kind, unless its name is taken."""
        taken = among.get(item.name)
        if taken is not None:
            raise PruneForgeError(
                f"{item.kind} {item.name!r} of plugin {item.plugin!r} is already registered by plugin "
                f"{taken.plugin!r}; block one of them with PRUNEFORGE_PLUGINS=-{taken.plugin}"
            )
        among[item.name] = item

    def drop(self, plugin: str) -> None:
        """Forget everything that `plugin` registered."""
        registered: list[dict[str, Any]] = [*self._entries.values(), *self._files.values()]
        for items in registered:
            for name in [name for name, item in items.items() if item.plugin == plugin]:
                del items[name]

    def entries(self, kind: str) -> list[Entry]:
        """Return the entries of one kind, by name."""
        return [self._entries[kind][name] for name in sorted(self._entries[kind])]

    def get(self, kind: str, name: str) -> Entry:
        """Return one entry.

        Raises:
            PruneForgeError: Nobody registered the name; the message offers the nearest.
        """
        return _named(kind, name, self._entries[kind])

    def files(self, kind: ShippedKind) -> list[Shipped]:
        """Return the files of one kind, in the order of their registration."""
        return list(self._files[kind].values())

    def file(self, kind: ShippedKind, name: str) -> Shipped:
        """Return one file.

        Raises:
            PruneForgeError: Nobody registered the name; the message offers the nearest.
        """
        return _named(kind, name, self._files[kind])

    def create(self, kind: str, spec: str, options: Mapping[str, Any] | None = None) -> Any:
        """Return an instance of what `spec` names.

        Args:
            kind: One of `KINDS`.
            spec: `name` or `name:argument`; the argument sets the option that the class calls its `argument`.
            options: Option names and values.

        Raises:
            PruneForgeError: The kind or the name is unknown, lacks its library, takes no argument, or an option is
                wrong.
        """
        if kind not in KINDS:
            raise unknown_name("kind of plugin", kind, KINDS)
        name, colon, argument = spec.partition(":")
        entry = self.get(kind, name)
        lacking = entry.lacking()
        if lacking is not None:
            raise PruneForgeError(lacking)
        cls = entry.load()
        values = dict(options or {})
        if colon:
            if cls.argument is None:
                raise PruneForgeError(f"{kind} {name!r} takes no argument, got {spec!r}")
            if values.get(cls.argument, argument) != argument:
                raise PruneForgeError(
                    f"option {cls.argument!r} of {kind} {name!r} is given twice, as {values[cls.argument]!r} and in "
                    f"{spec!r}"
                )
            values[cls.argument] = argument
        instance = cls.__new__(cls)
        instance.name = name  # before the options are read, so that a message about them says the registered name
        instance.__init__(**values)  # type: ignore[misc]
        return instance
