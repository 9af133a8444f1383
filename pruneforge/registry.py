"""What is registered under which name, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.options import Configurable, parse_options

KINDS = ("metric", "adapter", "source", "evaluator", "demo")


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        kind: One of `KINDS`.
        name: What users call it.
        target: The class, or `"module:Class"` to import it from.
        plugin: Name of the plugin that registered it.
    """

    kind: str
    name: str
    target: str | type[Configurable]
    plugin: str

    def load(self) -> type[Configurable]:
        """Import and return the class.

        Raises:
            PruneForgeError: The target cannot be imported, naming the plugin.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a plugin's module may fail in any way
            raise PruneForgeError(
                f"{self.kind} {self.name!r} of plugin {self.plugin!r} cannot be imported from {self.target}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error


class Registry:
    """Metrics, adapters, sources, evaluators and demos by name.

    A plugin fills it in its `pruneforge_register` hook.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self.plugin = "python"
        """Name of the plugin that is registering now."""

    def metric(self, name: str, target: str | type[Configurable]) -> None:
        """Register a `pruneforge.Metric`."""
        self._add("metric", name, target)

    def adapter(self, name: str, target: str | type[Configurable]) -> None:
        """Register a `pruneforge.Adapter`."""
        self._add("adapter", name, target)

    def source(self, name: str, target: str | type[Configurable]) -> None:
        """Register a `pruneforge.Source`."""
        self._add("source", name, target)

    def evaluator(self, name: str, target: str | type[Configurable]) -> None:
        """Register a `pruneforge.Evaluator`."""
        self._add("evaluator", name, target)

    def demo(self, name: str, target: str | type[Configurable]) -> None:
        """Register a `pruneforge.Demo`."""
        self._add("demo", name, target)

    def _add(self, kind: str, name: str, target: str | type[Configurable]) -> None:
        taken = self._entries[kind].get(name)
        if taken is not None:
            raise PruneForgeError(
                f"{kind} {name!r} of plugin {self.plugin!r} is already registered by plugin {taken.plugin!r}; "
                f"block one of them with PRUNEFORGE_PLUGINS=-{taken.plugin}"
            )
        self._entries[kind][name] = Entry(kind, name, target, self.plugin)

    def drop(self, plugin: str) -> None:
        """Forget everything that `plugin` registered."""
        for entries in self._entries.values():
            for name in [name for name, entry in entries.items() if entry.plugin == plugin]:
                del entries[name]

    def entries(self, kind: str) -> list[Entry]:
        """Return the entries of one kind, by name."""
        return [self._entries[kind][name] for name in sorted(self._entries[kind])]

    def get(self, kind: str, name: str) -> Entry:
        """Return one entry.

        Raises:
            PruneForgeError: Nobody registered the name; the message offers the nearest.
        """
        try:
            return self._entries[kind][name]
        except KeyError:
            raise unknown_name(kind, name, self._entries[kind]) from None

    def create(self, kind: str, spec: str, options: Mapping[str, Any] | None = None) -> Any:
        """Return an instance of what `spec` names.

        Args:
            kind: One of `KINDS`.
            spec: `name` or `name:argument`; the argument sets the option that the class calls its `argument`.
            options: Option names and values.

        Raises:
            PruneForgeError: The name is unknown, takes no argument, or an option is wrong.
        """
        name, colon, argument = spec.partition(":")
        cls = self.get(kind, name).load()
        values = dict(options or {})
        if colon:
            if cls.argument is None:
                raise PruneForgeError(f"{kind} {name!r} takes no argument, got {spec!r}")
            values[cls.argument] = argument
        parse_options(cls, values, name)  # so that a message says the registered name
        instance = cls(**values)
        instance.name = name
        return instance
