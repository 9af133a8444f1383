"""Run the cells of a study that are not finished, sharing what they have in common."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pruneforge.checkpoint.journal import difference
from pruneforge.errors import PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress, as_progress
from pruneforge.runs.job import make_job
from pruneforge.runs.loading import load_model
from pruneforge.studies.cells import DenseEvaluation, arguments, passes
from pruneforge.studies.executors import Executor, Local
from pruneforge.studies.folder import CELL_FILE, StudyFolder, place_of
from pruneforge.studies.published import published_numbers
from pruneforge.studies.study import Cell, Study, cells_of, save_study


def run_study(
    study: Study,
    folder: Path,
    progress: bool | Progress = False,
    executor: Executor | None = None,
    only: Sequence[str] = (),
) -> list[Cell]:
    """Run every cell of a study that its folder does not hold, and return all cells.

    Everything that can be known beforehand is checked before the first cell runs. A cell that fails is recorded with
    its reason, and the rest goes on; it is tried again the next time.

    Args:
        study: The study.
        folder: Its folder, new or of the same study.
        progress: `True` for bars on a terminal.
        executor: Where the cells run; by default one after another in this process.
        only: Which cells to run: keys with wildcards, such as `"*/*/0.5/*"`, or one part of several, such as `"2/16"`.
            All by default.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit, or the folder holds other cells.
    """
    for library in ("jinja2", "matplotlib", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise PruneForgeError(
                f"the report of a study needs {library}; install the extra 'study' (pip install '.[study]')"
            )
    cells = cells_of(study, [plugin.origin for plugin in loaded_plugins().loaded if plugin.from_file])
    chosen = chosen_cells(cells, only)
    check(study, cells)
    held = StudyFolder(folder)
    missing = [cell for cell in chosen if not _is_finished(held, cell)]
    folder.mkdir(parents=True, exist_ok=True)
    save_study(study, folder)
    dense = list(_dense_evaluations(study, held, {cell.model for cell in chosen}))
    executor = executor or Local(workers=1)
    arriving = _finished_cells(executor.run([*dense, *passes(missing)], held), missing)
    for _ in as_progress(progress).track(arriving, "cells", len(missing)):
        pass
    return cells


def chosen_cells(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Return the cells that are asked for; all if nothing is.

    A part of several is made of whole passes over the calibration data, so parts share no work. It is the same
    whatever is finished, so that parts may run at any time, side by side.

    Raises:
        PruneForgeError: What is asked for names no cell.
    """
    if not only:
        return list(cells)
    chosen: set[str] = set()
    for asked in only:
        part = re.fullmatch(r"(\d+)/(\d+)", asked)
        if part:
            number, count = int(part[1]), int(part[2])
            if not 1 <= number <= count:
                raise PruneForgeError(f"cells {asked!r}: parts are numbered from 1 to {count}")
            keys = {cell.key for group in passes(cells)[number - 1 :: count] for cell in group.cells}
        else:
            keys = {cell.key for cell in cells if fnmatchcase(cell.key, asked)}
            if not keys:
                raise PruneForgeError(
                    f"cells {asked!r} names none; they have keys such as {cells[0].key!r}, and '*' stands for any text"
                )
        chosen |= keys
    return [cell for cell in cells if cell.key in chosen]


def check(study: Study, cells: Sequence[Cell]) -> None:
    """Raise if a cell cannot run, as far as that shows without loading a model whole.

    Raises:
        PruneForgeError: Naming the model or the cell.
    """
    published_numbers()  # the report needs them
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
            make_job(**arguments(cell))
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
    return not held.lacks(cell)


def _dense_evaluations(study: Study, held: StudyFolder, models: set[str]) -> Iterator[DenseEvaluation]:
    for label, model in study.models.items():
        for number, task in enumerate(model.tasks) if label in models else ():
            evaluation = DenseEvaluation(label, model.model, number, task, study.device, study.items)
            if (held.dense(label, number) or {}).get("asked") != evaluation.asked():
                yield evaluation


def _finished_cells(places: Iterator[str], cells: Sequence[Cell]) -> Iterator[str]:
    """Yield those places that say that a cell is finished."""
    awaited = {place_of(cell, CELL_FILE) for cell in cells}
    return (place for place in places if place in awaited)
