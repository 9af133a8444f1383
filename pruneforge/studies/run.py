"""Run the cells of a study that are not finished, sharing what they have in common."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pruneforge.checkpoint.durable import writing
from pruneforge.checkpoint.journal import difference
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.patterns import parse_pattern
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress, as_progress
from pruneforge.runs.job import make_job
from pruneforge.runs.loading import load_model
from pruneforge.runs.places import STUDY_FILE
from pruneforge.runs.plan import split_excluded
from pruneforge.runs.provenance import fingerprint
from pruneforge.studies.cells import DenseEvaluation, arguments, passes
from pruneforge.studies.executors import Executor, Local
from pruneforge.studies.folder import CELL_FILE, LOCK, StudyFolder, as_json, model_place, place_of
from pruneforge.studies.plan import Cell, cells_of
from pruneforge.studies.published import published_numbers
from pruneforge.studies.study import Study, save_study


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
        progress: `True` for bars on a terminal, and lines elsewhere.
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
    _check_folder(folder)
    held, executor = StudyFolder(folder), executor or Local(workers=1)
    _check_device(study, executor)
    missing = [cell for cell in chosen if not _is_finished(held, cell)]
    dense = list(_dense_evaluations(study, held, {cell.model for cell in chosen}))
    fingerprints = _unchanged(study, {part.model for part in missing} | {part.label for part in dense}, cells, held)
    with writing(folder, "study folder"):
        held.sweep()
        save_study(study, folder)
    for name, found in fingerprints.items():
        held.keep(model_place(name), as_json({"fingerprint": found}))
    _run(dense, missing, held, executor, as_progress(progress))
    return cells


def _run(
    dense: Sequence[DenseEvaluation], missing: Sequence[Cell], held: StudyFolder, executor: Executor, bars: Progress
) -> None:
    """Evaluate dense models, and make the cells of those that could be."""
    for _ in bars.track(executor.run(dense, held), "dense models", len(dense)):
        pass
    possible = []
    for cell in missing:
        why = _dense_failure(held, cell)
        if why:
            held.keep(place_of(cell, CELL_FILE), as_json({"asked": cell.asked(), "failed": why}))
        else:
            possible.append(cell)
    for _ in bars.track(_finished_cells(executor.run(passes(possible), held), possible), "cells", len(possible)):
        pass


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
        part = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", asked)
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
            loaded = load_model(model.model, model.dtype, None, registry, model.adapter_options, on_disk=True)
            blocks, _ = split_excluded(loaded.adapter.blocks(loaded.module), model.exclude)
            patterns = dict.fromkeys(cell.pattern for cell in cells if cell.model == name)
            for text in (each for each in patterns if isinstance(each, str)):
                for layer in (layer for block in blocks for layer in block.layers):
                    parse_pattern(None, text, "row").check(layer.name, layer.shape[1])
            for task in model.tasks:
                registry.create("evaluator", task.task, task.options)
        except PruneForgeError as error:
            raise PruneForgeError(f"model {name!r}: {error}") from error
    for cell in cells:
        try:
            make_job(**arguments(cell))
        except PruneForgeError as error:
            raise PruneForgeError(f"cell {cell.key}: {error}") from error


def _unchanged(study: Study, names: Collection[str], cells: Sequence[Cell], held: StudyFolder) -> dict[str, str]:
    """Return the fingerprints of models, by name.

    Raises:
        PruneForgeError: One is another model than what the folder holds results of.
    """
    fingerprints, registry = {}, loaded_plugins().registry
    for name in names:
        model = study.models[name]
        loaded = load_model(model.model, model.dtype, None, registry, model.adapter_options, on_disk=True)
        found = loaded.checkpoint.fingerprint() if loaded.checkpoint else fingerprint(loaded.module)
        fingerprints[name], before = found, held.fingerprint(name)
        results = [held.dense(name, number) for number in range(len(model.tasks))]
        results += [held.cell(cell) for cell in cells if cell.model == name]
        succeeded = any(result is not None and "failed" not in result for result in results)
        if succeeded and before is not None and before != found:
            raise PruneForgeError(
                f"model {name!r} has changed since {str(held.path)!r} was begun (its fingerprint was {before[:12]} and "
                f"is {found[:12]}); name another folder, or remove {str(held.path / 'cells' / name)!r} and "
                f"{str(held.path / 'dense' / name)!r}"
            )
    return fingerprints


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
            evaluation = DenseEvaluation(label, model.model, number, task, study.device, model.dtype)
            found = held.dense(label, number) or {"failed": ""}
            if "failed" in found or found["asked"] != evaluation.asked():
                yield evaluation


def _dense_failure(held: StudyFolder, cell: Cell) -> str:
    """Return why the dense model of a cell cannot be evaluated, or an empty text."""
    for number, task in enumerate(cell.tasks):
        why = (held.dense(cell.model, number) or {}).get("failed")
        if why:
            return f"the dense model cannot be evaluated on {task.task}: {why}"
    return ""


def _check_folder(folder: Path) -> None:
    """Raise unless a folder is a study's, or can become one.

    Raises:
        PruneForgeError: It is something else, holds something else, or cannot be written.
    """
    parent = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PruneForgeError(f"{str(folder)!r} cannot be written: {str(parent)!r} is no folder, or is read-only")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    begun = STUDY_FILE in names and names & {"cells", LOCK}
    if not begun and any(not name.startswith(".") for name in names):  # hidden: of a run that ended at once
        raise PruneForgeError(f"{str(folder)!r} holds other files than a study's; name a folder of its own")


def _check_device(study: Study, executor: Executor) -> None:
    if isinstance(executor, Local) and executor.options.workers > 1 and study.device.startswith("cuda:"):
        raise PruneForgeError(
            f"device {study.device!r} is one GPU, and each of several workers has its own; write `device: cuda`, or "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )


def _finished_cells(places: Iterator[str], cells: Sequence[Cell]) -> Iterator[str]:
    """Yield those places that say that a cell is finished."""
    awaited = {place_of(cell, CELL_FILE) for cell in cells}
    return (place for place in places if place in awaited)
