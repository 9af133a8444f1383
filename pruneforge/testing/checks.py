"""Collect the checks of a plugin, run them, or make tests of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter
from pruneforge.interfaces.allocator import Allocator
from pruneforge.interfaces.evaluator import Evaluator
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.recovery import Recovery
from pruneforge.interfaces.refiner import Refiner
from pruneforge.interfaces.registry import KINDS, imported
from pruneforge.interfaces.source import Source
from pruneforge.interfaces.statistics import Statistic
from pruneforge.testing import adapter, allocator, evaluator, metric, recovery, refiner, source, statistic
from pruneforge.testing.kit import Kit, name_of

KITS: dict[type, Kit] = {
    Metric: metric.KIT,
    Allocator: allocator.KIT,
    Refiner: refiner.KIT,
    Recovery: recovery.KIT,
    Adapter: adapter.KIT,
    Source: source.KIT,
    Evaluator: evaluator.KIT,
    Statistic: statistic.KIT,
}
"""The checks of each kind of plugin, by its base class; a new kind is a line here."""

CLASSES: tuple[type, ...] = (Statistic,)
"""Kinds that are given as classes: the engine makes their objects."""


def checked_kinds() -> list[str]:
    """Return the kinds of registered plugins that there are checks of."""
    return [kind for kind, base in KINDS.items() if imported(base) in KITS]


@dataclass(frozen=True)
class Check:
    """One check of one plugin.

    Attributes:
        plugin: The plugin with its options, or a case of it.
        name: What is checked.
        run: Raises if the plugin does not keep the promise; the message says how.
        skip: Why it cannot be run here, or `None`.
    """

    plugin: Any
    name: str
    run: Callable[[], None]
    skip: str | None = None

    def __str__(self) -> str:
        return f"{name_of(self.plugin)}: {self.name}"


def checks_for(plugin: Any) -> list[Check]:
    """Return the checks of a plugin that is made with its options, of a case of one, or of a class of statistics.

    Raises:
        PruneForgeError: There are no checks of it.
    """
    for base, kit in KITS.items():
        if kit.case is not None and isinstance(plugin, kit.case):
            return _checks(kit, [plugin])
        if _is_a(plugin, base):
            return _checks(kit, kit.cases(plugin))
    kinds = ", ".join([*checked_kinds(), *(f"{base.__name__.lower()} class" for base in CLASSES)])
    what = f"the class {plugin.__name__}" if isinstance(plugin, type) else type(plugin).__name__
    raise PruneForgeError(f"there are no checks of {what}; it is not one of {kinds}")


def _is_a(plugin: Any, base: type) -> bool:
    return isinstance(plugin, type) and issubclass(plugin, base) if base in CLASSES else isinstance(plugin, base)


def _checks(kit: Kit, cases: Sequence[Any]) -> list[Check]:
    skips = {name: why() for name, why in kit.skips.items()}
    return [
        Check(case, name, partial(check, case), skips.get(name)) for case in cases for name, check in kit.checks.items()
    ]


def run_checks(plugins: Iterable[Any]) -> Iterator[tuple[Check, str | None]]:
    """Yield each check of some plugins with what is wrong, in one line, or `None`; skipped checks are not run."""
    for plugin in plugins:
        for check in checks_for(plugin):
            try:
                if check.skip is None:
                    check.run()
            except Exception as error:  # a plugin may fail in any way
                name = "" if isinstance(error, AssertionError | PruneForgeError) else f"{type(error).__name__}: "
                yield check, name + (" ".join(str(error).split()) or "failed")
            else:
                yield check, None


def checker(base: type) -> Callable[[Any], None]:
    """Return a function that runs all checks of a plugin of one kind, for tests that need no names."""
    kind = base.__name__.lower()

    def check(plugin: Any) -> None:
        if not _is_a(plugin, base) and not isinstance(plugin, KITS[base].case or ()):
            raise PruneForgeError(f"{plugin!r} cannot be checked as {kind}")
        failed = [f"{each.name}: {said}" for each, said in run_checks([plugin]) if said is not None]
        assert not failed, "\n".join([f"{kind} {name_of(plugin)} fails {len(failed)} checks", *failed])

    check.__name__ = check.__qualname__ = f"check_{kind}"
    check.__doc__ = f"Run all checks of one {kind}, and raise `AssertionError` that names each one that it fails."
    return check


check_metric = checker(Metric)
check_allocator = checker(Allocator)
check_refiner = checker(Refiner)
check_recovery = checker(Recovery)
check_adapter = checker(Adapter)
check_source = checker(Source)
check_evaluator = checker(Evaluator)
check_statistic = checker(Statistic)


def parametrize_with_checks(
    plugins: Sequence[Any], expected_failures: Mapping[str, Mapping[str, str]] | None = None
) -> Any:
    """Return a decorator that makes a test of every check of some plugins.

    Example::

        @parametrize_with_checks([Mine(), Mine(power=2)], {"mine": {"rows are pruned alike": "scores are random"}})
        def test_my_metric(check):
            check.run()

    Args:
        plugins: Plugins made with their options, cases of them, and classes of statistics.
        expected_failures: By a plugin's name, the checks that it fails on purpose, each with the reason. A check that
            passes although it is expected to fail is a failure.

    Raises:
        PruneForgeError: A check that is expected to fail does not exist.
    """
    import pytest  # which only those who test have

    expected = {name: dict(reasons) for name, reasons in (expected_failures or {}).items()}
    parameters, known = [], set()
    for check in (check for plugin in plugins for check in checks_for(plugin)):
        known.add((name_of(check.plugin), check.name))
        reason = expected.get(name_of(check.plugin), {}).get(check.name)
        marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
        marks += [] if check.skip is None else [pytest.mark.skip(reason=check.skip)]
        parameters.append(pytest.param(check, marks=marks, id=str(check)))
    for name, reasons in expected.items():
        for check_name in reasons:
            if (name, check_name) not in known:
                raise PruneForgeError(f"{name!r} has no check {check_name!r} that could be expected to fail")
    return pytest.mark.parametrize("check", parameters)
