"""The observers of runs: which are asked for, what they are given, and what becomes of one that fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from typing import Any

from pruneforge.engine.guard import named
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.observer import Observer, Value
from pruneforge.interfaces.registry import Registry
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.runs.parts import options_by_label


def make_observers(specs: Sequence[str], options: Mapping[str, Any], registry: Registry) -> list[Observer]:
    """Return observers for one run.

    Raises:
        PruneForgeError: There is none of a name, its library is not installed, it has no such option, or there are
            options and no observer.
    """
    if options and not specs:
        raise PruneForgeError("observer options need the name of what they belong to; add `observe`")
    given = options_by_label(specs, options, "observer") if specs else {}
    return [registry.create("observer", spec, given[spec]) for spec in specs]


@contextmanager
def observing(runs: Sequence[Run], several: bool) -> Iterator[None]:
    """Start the observers of some runs; those whose run does not finish within the context are closed at its end.

    Args:
        runs: The runs.
        several: Whether they are of one pass that makes several, in folders of their own below the output.

    Raises:
        PruneForgeError: An observer cannot start.
    """
    with ExitStack() as started:
        for run in runs:
            for observer in run.observers:
                config = flat(run.recipe.model_dump(mode="json"))
                _call(observer, "to start", partial(observer.start, _name(run, observer, several), config))
                started.callback(_abandon, run, observer)
        yield


def block_pruned(run: Run, result: BlockResult) -> None:
    """Tell a run's observers of a finished block."""
    size = sum(layer.size for layer in result.block.layers)
    values = {
        "block/sparsity": sum(result.pruned.values()) / size if size else 0.0,
        "block/notes": float(len(result.notes)),
    }
    for observer in list(run.observers):
        where = f"at block {result.index + 1} of {len(run.blocks)}"
        _tell(run, observer, where, partial(observer.log, result.index, values))


def finished(run: Run, report: Mapping[str, Any]) -> None:
    """Tell a run's observers of its report, to which one that fails now adds a warning."""
    measured = report["measured"]
    summary = {
        "sparsity": report["sparsity"]["reached"],
        "seconds": measured["seconds"],
        "peak_memory": measured["peak_memory"],
        "warnings": "\n".join(report["warnings"]) or None,
    }
    for observer in list(run.observers):
        _tell(run, observer, "at the end", partial(observer.close, flat({"run": summary})))
    run.observers = []


def flat(values: Mapping[str, Any]) -> dict[str, Value]:
    """Return nested settings as `outer/inner` and a number or text, without those that are empty."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": each for inner, each in flat(value).items()}
        elif isinstance(value, list):
            found |= {name: ", ".join(map(str, value))} if value else {}
        elif value is not None:
            found[name] = value
    return found


def _name(run: Run, observer: Observer, several: bool) -> str:
    """Return what a run is called: as the user says, as its folder, or by metric and pattern."""
    given: str | None = observer.options.name
    if run.folder is None:
        return given or f"{run.metric.name}-{run.pattern}"
    folder = run.folder.resolve()
    return f"{given or folder.parent.name}-{folder.name}" if several else given or folder.name


def _tell(run: Run, observer: Observer, where: str, call: Callable[[], None]) -> None:
    """Call an observer; if it fails, go on without it, with a warning."""
    try:
        _call(observer, where, call)
    except PruneForgeError as error:
        run.warnings.append(f"{error}; the rest of the run is not logged there")
        _abandon(run, observer)


def _abandon(run: Run, observer: Observer) -> None:
    """Close the log of a run that did not finish, or that is not logged to its end."""
    if observer in run.observers:
        run.observers.remove(observer)
        with suppress(PruneForgeError):  # what went wrong first has been said
            _call(observer, "to close", partial(observer.close, None))


def _call(observer: Observer, where: str, call: Callable[[], None]) -> None:
    """Call an observer, whose library may print: standard output is the run's own.

    Raises:
        PruneForgeError: It fails in any way.
    """
    with redirect_stdout(sys.stderr):
        named(f"observer {observer.name!r}", where, call)
