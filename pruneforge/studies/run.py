"""Run the cells of a study that are not finished, sharing what they have in common."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.durable import write_text
from pruneforge.checkpoint.journal import difference
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.evaluator import Evaluator
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress, as_progress
from pruneforge.runs.evaluate import evaluate
from pruneforge.runs.inspect import masks_in_short
from pruneforge.runs.job import make_job
from pruneforge.runs.loading import load_model
from pruneforge.runs.prune import prune, prune_each
from pruneforge.runs.result import PruneResult
from pruneforge.studies.study import Cell, Study, cells_of, save_study

CELL_FILE, MEASURED_FILE = "cell.json", "measured.json"
"""What a cell found, and what differs between two runs of it."""


class StudyFolder:
    """The folder of a study: `study.yaml`, `cells/`, `dense/`, and what is made of them.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a finished or failed cell found, or `None`."""
        return _read(self.path / "cells" / cell.key / CELL_FILE)

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Return the times and the memory of a finished cell."""
        return _read(self.path / "cells" / cell.key / MEASURED_FILE) or {}

    def dense(self, model: str, task: int) -> dict[str, Any] | None:
        """Return what the dense model gave on one of its tasks, or `None`."""
        return _read(self.path / "dense" / model / f"{task}.json")

    def keep(self, place: str, found: Mapping[str, Any]) -> None:
        """Write a JSON file below the folder, whole or not at all."""
        file = self.path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(found, indent=1) + "\n", file)


def run_study(study: Study, folder: Path, progress: bool | Progress = False) -> list[Cell]:
    """Run every cell of a study that its folder does not hold, and return all cells.

    Everything that can be known beforehand is checked before the first cell runs. A cell that fails is recorded with
    its reason, and the rest goes on; it is tried again the next time.

    Args:
        study: The study.
        folder: Its folder, new or of the same study.
        progress: `True` for bars on a terminal.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit, or the folder holds other cells.
    """
    for library in ("jinja2", "matplotlib", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise PruneForgeError(
                f"the report of a study needs {library}; install the extra 'study' (pip install '.[study]')"
            )
    cells = cells_of(study, [plugin.origin for plugin in loaded_plugins().loaded if plugin.from_file])
    check(study, cells)
    held = StudyFolder(folder)
    missing = [cell for cell in cells if not _is_finished(held, cell)]
    folder.mkdir(parents=True, exist_ok=True)
    save_study(study, folder)
    bars = as_progress(progress)
    for name, model in study.models.items():
        for number, task in enumerate(model.tasks):
            if held.dense(name, number) is None:
                held.keep(f"dense/{name}/{number}.json", _evaluated(model.model, task, study.device))
    for group in bars.track(_groups(missing), "groups of cells"):
        _run_group(group, held)
    return cells


def check(study: Study, cells: Sequence[Cell]) -> None:
    """Raise if a cell cannot run, as far as that shows without loading a model whole.

    Raises:
        PruneForgeError: Naming the model or the cell.
    """
    registry = loaded_plugins().registry
    for name, model in study.models.items():
        try:
            load_model(model.model, model.dtype, None, registry, model.adapter_options, on_disk=True)
            for task in model.tasks:
                registry.create("evaluator", task.task, task.options)
        except PruneForgeError as error:
            raise PruneForgeError(f"model {name!r}: {error}") from error
    for cell in cells:
        try:
            make_job(**_settings(cell))
        except PruneForgeError as error:
            raise PruneForgeError(f"cell {cell.key}: {error}") from error


def _is_finished(held: StudyFolder, cell: Cell) -> bool:
    found = held.cell(cell)
    if found is None or "failed" in found:
        return False
    other = difference(found["asked"], cell.asked())
    if other:
        raise PruneForgeError(
            f"cell {cell.key} in {str(held.path)!r} is of another study: {other}; name another folder, or remove "
            f"{str(held.path / 'cells' / cell.key)!r} to run it again"
        )
    return True


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells that one pass can make: of one model and draw, with the same parts beside the metric."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = cell.recipe.model_dump(exclude={"metric", "options", "sparsity", "pattern"})
        alone = cell.key if cell.recipe.propagate == "pruned" else ""
        groups.setdefault(json.dumps([cell.model, alone, shared], sort_keys=True), []).append(cell)
    return list(groups.values())


def _run_group(cells: Sequence[Cell], held: StudyFolder) -> None:
    """Run cells in one pass; if that fails, each alone, so that only those that are to blame fail."""
    if len(cells) > 1:
        try:
            _together(cells, held)
        except UnfinishedError:
            raise
        except PruneForgeError:
            pass
        else:
            return
    for cell in cells:
        try:
            _finish(cell, prune(**_settings(cell)), held, 1)
        except UnfinishedError:
            raise
        except PruneForgeError as error:
            held.keep(f"cells/{cell.key}/{CELL_FILE}", {"asked": cell.asked(), "failed": str(error)})


def _together(cells: Sequence[Cell], held: StudyFolder) -> None:
    """Make cells in one pass over the calibration data, into a folder that is removed afterwards."""
    work = held.path / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    labels = {method: f"m{number}" for number, method in enumerate(by_method)}
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    settings = _settings(cells[0])
    for name in ("metric", "options", "sparsity", "pattern"):
        settings.pop(name, None)
    metrics = {labels[method]: of_method[0].recipe.metric for method, of_method in by_method.items()}
    options = {labels[method]: of_method[0].recipe.options for method, of_method in by_method.items()}
    if len(metrics) == 1:
        options = next(iter(options.values()))
    results = prune_each(metric=metrics, patterns=patterns, options=options, output=work, **settings)
    try:
        for cell in cells:
            pattern = str(cell.pattern).replace(":", "of")
            name = pattern if len(metrics) == 1 else f"{labels[cell.method]}-{pattern}"
            _finish(cell, results[name], held, len(results))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _finish(cell: Cell, result: PruneResult, held: StudyFolder, together: int) -> None:
    """Evaluate a cell's model, and write what was found; the cell is finished when its file is there."""
    evaluations = [_evaluated(result, task, cell.recipe.device) for task in cell.tasks]
    report = result.report
    seconds = report["measured"]["seconds"]
    measured = {
        "seconds": seconds["total"],
        "runs_in_the_pass": together,
        "peak_bytes": report["measured"]["peak_memory"]["host_bytes"],
        "stages": seconds,
    }
    held.keep(f"cells/{cell.key}/{MEASURED_FILE}", measured)
    found = {
        "asked": cell.asked(),
        "sparsity": report["sparsity"]["reached"],
        "scope": report["pattern"]["scope"],
        "evaluations": evaluations,
        "masks": masks_in_short(result.masks),
        "warnings": report["warnings"],
        "versions": report["versions"],
    }
    held.keep(f"cells/{cell.key}/{CELL_FILE}", found)


def _evaluated(model: str | PruneResult, task: Any, device: str) -> dict[str, Any]:
    """Return an evaluation without what differs between two runs of it."""
    outcome = evaluate(model, task.task, task.options, batch_size=task.batch_size, device=device)
    kind = loaded_plugins().registry.get("evaluator", task.task.partition(":")[0]).load()
    assert issubclass(kind, Evaluator)
    left_out = {"recipe", "versions", *kind.measured}
    return {
        **{name: value for name, value in outcome.items() if name not in left_out},
        "measure": kind.measure,
        "higher_is_better": kind.higher_is_better,
        "share": kind.share,
    }


def _settings(cell: Cell) -> dict[str, Any]:
    """Return the arguments of `prune` that make a cell."""
    settings: dict[str, Any] = cell.recipe.model_dump(exclude={"plugins"})
    return {name: value for name, value in settings.items() if value is not None}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PruneForgeError(f"{str(path)!r} is damaged: {error}; remove it to run the cell again") from error
    return found
