"""Collect the checks of a plugin, run them, or make tests of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.allocator import Allocator
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.refiner import Refiner
from pruneforge.interfaces.registry import KINDS, imported
from pruneforge.testing import allocator, metric, refiner

CHECKS: dict[type, dict[str, Callable[[Any], None]]] = {
    Metric: metric.CHECKS,
    Allocator: allocator.CHECKS,
    Refiner: refiner.CHECKS,
}


def checked_kinds() -> list[str]:
    """Return the kinds of plugins that there are checks of."""
    return [kind for kind, base in KINDS.items() if imported(base) in CHECKS]


@dataclass(frozen=True)
class Check:
    """One check of one plugin.

    Attributes:
        plugin: The plugin, with its options.
        name: What is checked.
        run: Raises if the plugin does not keep the promise; the message says how.
    """

    plugin: Any
    name: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.plugin.name}: {self.name}"


def checks_for(plugin: Any) -> list[Check]:
    """Return the checks of a metric, an allocator or a refiner that is made with its options.

    Raises:
        PruneForgeError: It is none of these.
    """
    for kind, checks in CHECKS.items():
        if isinstance(plugin, kind):
            return [Check(plugin, name, partial(check, plugin)) for name, check in checks.items()]
    kinds = ", ".join(checked_kinds())
    raise PruneForgeError(f"there are no checks of {type(plugin).__name__}; it is not one of {kinds}")


def run_checks(plugins: Iterable[Any]) -> Iterator[tuple[Check, str | None]]:
    """Yield each check of some plugins with what is wrong, in one line, or `None`."""
    for plugin in plugins:
        for check in checks_for(plugin):
            try:
                check.run()
            except Exception as error:  # a plugin may fail in any way
                name = "" if isinstance(error, AssertionError | PruneForgeError) else f"{type(error).__name__}: "
                yield check, name + (" ".join(str(error).split()) or "failed")
            else:
                yield check, None


def parametrize_with_checks(
    plugins: Sequence[Any], expected_failures: Mapping[str, Mapping[str, str]] | None = None
) -> Any:
    """Return a decorator that makes a test of every check of some plugins.

    Example::

        @parametrize_with_checks([Mine(), Mine(power=2)], {"mine": {"rows are pruned alike": "scores are random"}})
        def test_my_metric(check):
            check.run()

    Args:
        plugins: Metrics, allocators and refiners, made with their options.
        expected_failures: By a plugin's name, the checks that it fails on purpose, each with the reason. A check that
            passes although it is expected to fail is a failure.

    Raises:
        PruneForgeError: A check that is expected to fail does not exist.
    """
    import pytest  # which only those who test have

    expected = {name: dict(reasons) for name, reasons in (expected_failures or {}).items()}
    parameters = []
    for plugin in plugins:
        for check in checks_for(plugin):
            reason = expected.get(plugin.name, {}).get(check.name)
            marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
            parameters.append(pytest.param(check, marks=marks, id=str(check)))
    known = {(check.plugin.name, check.name) for plugin in plugins for check in checks_for(plugin)}
    for name, reasons in expected.items():
        for check_name in reasons:
            if (name, check_name) not in known:
                raise PruneForgeError(f"{name!r} has no check {check_name!r} that could be expected to fail")
    return pytest.mark.parametrize("check", parameters)
