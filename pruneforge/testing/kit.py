"""What the checks of one kind of plugin consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

CheckFunction = Callable[[Any], None]
"""Raises if a plugin, or a case of it, does not keep a promise; the message says how."""


def itself(plugin: Any) -> Sequence[Any]:
    """Return a plugin that needs nothing else to be checked."""
    return [plugin]


@dataclass(frozen=True)
class Kit:
    """The checks of one kind of plugin.

    Attributes:
        checks: The checks, by what they say.
        cases: Returns what the checks of a plugin are run on: the plugin, or the plugin together with models or data.
        case: Class of these cases, which `checks_for` takes as well as plugins; `None` where they are the plugin.
        skips: By check, a function that returns why it cannot be run here, or `None`.
    """

    checks: Mapping[str, CheckFunction]
    cases: Callable[[Any], Sequence[Any]] = itself
    case: type | None = None
    skips: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)


def by_name(*functions: CheckFunction) -> dict[str, CheckFunction]:
    """Return check functions by what their names say; `_s_` stands for an apostrophe and s."""
    return {function.__name__.replace("_s_", "'s ").replace("_", " "): function for function in functions}


def where_present(attribute: str, *functions: CheckFunction) -> list[CheckFunction]:
    """Return checks that pass where this attribute of a case is `None`, which another check says already."""

    def guarded(check: CheckFunction) -> CheckFunction:
        @wraps(check)
        def run(case: Any) -> None:
            if getattr(case, attribute) is not None:
                check(case)

        return run

    return [guarded(check) for check in functions]


def name_of(plugin: Any) -> str:
    """Return what a plugin, a case of one, or a class of statistics is called."""
    return plugin.__name__ if isinstance(plugin, type) else str(plugin.name)
