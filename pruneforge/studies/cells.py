"""Make cells: evaluate dense models, prune those that share a pass together, and evaluate each result.

What is found is yielded file by file, so that the same work runs in this process, in others, and on other machines.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pruneforge.checkpoint.masks import MASKS_FILE, masks_file
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.evaluator import Evaluator
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.evaluate import evaluate
from pruneforge.runs.inspect import masks_in_short
from pruneforge.runs.loading import load_model
from pruneforge.runs.prune import prune, prune_each
from pruneforge.runs.result import PruneResult
from pruneforge.studies.folder import CELL_FILE, MEASURED_FILE, as_json, dense_place, items_file, place_of
from pruneforge.studies.study import Cell, Task

PICTURED = 96
"""Rows and columns of the part of a mask that is kept as a picture."""

DISK_SHARE = 0.8
"""Share of the free disk that the models of a pass may take before they are evaluated."""

Found = tuple[str, bytes]
"""Where a file belongs below the study's folder, and what it holds."""


class Work(ABC):
    """A part of a study that one process does."""

    @abstractmethod
    def run(self, work: Path) -> Iterator[Found]:
        """Do it, and yield what was found, a cell's own file last.

        Args:
            work: A folder for what the work writes meanwhile.
        """


@dataclass(frozen=True)
class DenseEvaluation(Work):
    """The evaluation of a dense model.

    Attributes:
        label: What the study calls the model.
        model: Its folder or hub id.
        number: Position of the task among the model's.
        task: The task.
        device: Where to compute.
        items: Whether each item's outcome is kept.
    """

    label: str
    model: str
    number: int
    task: Task
    device: str
    items: bool

    def asked(self) -> dict[str, Any]:
        """Return everything that decides the outcome, of types that JSON holds."""
        return {"model": self.model, "task": self.task.model_dump(mode="json")}

    def run(self, work: Path) -> Iterator[Found]:
        """Evaluate the model.

        Raises:
            PruneForgeError: The task cannot be done; no cell of the model could be evaluated either.
        """
        found, items = _evaluated(self.model, self.task, self.device, self.items)
        found = {"asked": self.asked(), **found}
        if self.items:
            yield f"dense/{self.label}/{items_file(self.number)}", as_json(items)
        yield dense_place(self.label, self.number), as_json(found)


@dataclass(frozen=True)
class Pass(Work):
    """Cells of one model and draw that one pass over the calibration data makes.

    Attributes:
        cells: The cells; they differ in metric, options and pattern alone.
    """

    cells: tuple[Cell, ...]

    def run(self, work: Path) -> Iterator[Found]:
        """Make the cells together; if that fails, each that is left alone, so that those to blame fail alone.

        Raises:
            UnfinishedError: Something stopped it that is no cell's fault, such as a full disk.
        """
        done: set[str] = set()
        if len(self.cells) > 1:
            try:
                at_once = _models_that_fit(self.cells[0], work)
                for start in range(0, len(self.cells), at_once):
                    for place, content in _together(self.cells[start : start + at_once], work):
                        done.add(place)
                        yield place, content
            except UnfinishedError:
                raise
            except Exception:  # plugins may fail in any way; alone, each says why
                pass
        for cell in self.cells:
            if place_of(cell, CELL_FILE) not in done:
                yield from _alone(cell)


def passes(cells: Sequence[Cell]) -> list[Pass]:
    """Return the passes that make cells: one for those of a model and draw with the same parts beside the metric."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = cell.recipe.model_dump(exclude={"metric", "options", "sparsity", "pattern"})
        alone = cell.key if cell.recipe.propagate == "pruned" else ""
        groups.setdefault(json.dumps([cell.model, alone, shared], sort_keys=True), []).append(cell)
    return [Pass(tuple(group)) for group in groups.values()]


def _together(cells: Sequence[Cell], work: Path) -> Iterator[Found]:
    """Make cells in one pass, and yield what was found; their models are gone from the disk afterwards."""
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    labels = {method: f"m{number}" for number, method in enumerate(by_method)}
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    settings = arguments(cells[0])
    for name in ("metric", "options", "sparsity", "pattern"):
        settings.pop(name, None)
    metrics = {labels[method]: of_method[0].recipe.metric for method, of_method in by_method.items()}
    options = {labels[method]: of_method[0].recipe.options for method, of_method in by_method.items()}
    if len(metrics) == 1:
        options = next(iter(options.values()))
    folder = work / "pass"
    try:
        results = prune_each(metric=metrics, patterns=patterns, options=options, output=folder, **settings)
        for cell in cells:
            pattern = str(cell.pattern).replace(":", "of")
            name = pattern if len(metrics) == 1 else f"{labels[cell.method]}-{pattern}"
            yield from _finished(cell, results.pop(name), len(cells))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _models_that_fit(cell: Cell, work: Path) -> int:
    """Return how many models of a cell's size the disk has room for, with some to spare; at least one."""
    recipe, registry = cell.recipe, loaded_plugins().registry
    loaded = load_model(recipe.model, recipe.dtype, None, registry, recipe.adapter_options, on_disk=True)
    if loaded.checkpoint is None:
        return 1  # it cannot be streamed, so nothing is shared
    size = sum(path.stat().st_size for path in loaded.checkpoint.folder.glob("*.safetensors"))
    return max(1, int(DISK_SHARE * shutil.disk_usage(work).free) // size)


def arguments(cell: Cell) -> dict[str, Any]:
    """Return the arguments of `prune` that make a cell."""
    settings: dict[str, Any] = cell.recipe.model_dump(exclude={"plugins"})
    given = {name: value for name, value in settings.items() if value is not None}
    return {**given, "details": "details" in cell.keeps}


def _alone(cell: Cell) -> Iterator[Found]:
    try:
        yield from _finished(cell, prune(**arguments(cell)), 1)
    except UnfinishedError:
        raise
    except Exception as error:  # plugins may fail in any way
        said = " ".join(str(error).split())
        reason = said if isinstance(error, PruneForgeError) else f"{type(error).__name__}: {said}"
        yield place_of(cell, CELL_FILE), as_json({"asked": cell.asked(), "failed": reason})


def _finished(cell: Cell, result: PruneResult, together: int) -> Iterator[Found]:
    """Evaluate a cell's model, and yield what was found."""
    wants_items = "items" in cell.keeps
    outcomes = [_evaluated(result, task, cell.recipe.device, wants_items) for task in cell.tasks]
    report = result.report
    seconds = report["measured"]["seconds"]
    measured = {
        "seconds": seconds["total"],
        "runs_in_the_pass": together,
        "peak_bytes": report["measured"]["peak_memory"]["host_bytes"],
        "peak_device_bytes": report["measured"]["peak_memory"].get("device_bytes"),
        "stages": seconds,
    }
    found = {
        "asked": cell.asked(),
        "sparsity": report["sparsity"]["reached"],
        "scope": report["pattern"]["scope"],
        "dtype": report["model"]["dtype"],
        "calibration_tokens": (report["calibration"] or {}).get("tokens"),
        "evaluations": [outcome for outcome, _ in outcomes],
        "masks": masks_in_short(result.masks),
        "warnings": report["warnings"],
        "versions": report["versions"],
    }
    if "details" in cell.keeps:
        names = ("error", "scores")
        found["details"] = {
            layer: {name: known[name] for name in names}
            for layer, known in report["layers"].items()
            if "error" in known
        }
        found["picture"] = _picture(result.masks)
    yield place_of(cell, MEASURED_FILE), as_json(measured)
    if "masks" in cell.keeps:
        yield place_of(cell, MASKS_FILE), masks_file(result.masks)
    for number, (_, items) in enumerate(outcomes) if wants_items else ():
        yield place_of(cell, items_file(number)), as_json(items)
    yield place_of(cell, CELL_FILE), as_json(found)


def _picture(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the corner of the mask of the layer in the middle, kept weights white, as a PNG in base64."""
    from PIL import Image

    names = list(masks)
    layer = names[len(names) // 2]
    corner = masks[layer][:PICTURED, :PICTURED]
    file = io.BytesIO()
    Image.fromarray(corner.numpy() * np.uint8(255)).convert("1").save(file, "PNG")
    return {"layer": layer, "shape": list(corner.shape), "png": base64.b64encode(file.getvalue()).decode()}


def _evaluated(model: str | PruneResult, task: Task, device: str, items: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an evaluation without what differs between two runs of it, and the outcome of each item."""
    outcome = evaluate(model, task.task, task.options, batch_size=task.batch_size, device=device, items=items)
    kind = loaded_plugins().registry.get("evaluator", task.task.partition(":")[0]).load()
    assert issubclass(kind, Evaluator)
    of_items = outcome.pop("items", {})
    left_out = {"recipe", "versions", *kind.measured}
    found = {
        **{name: value for name, value in outcome.items() if name not in left_out},
        "measure": kind.measure,
        "higher_is_better": kind.higher_is_better,
        "share": kind.share,
    }
    if kind.measure not in of_items:
        return found, {}
    ids = hashlib.sha256("\n".join(map(str, of_items["id"])).encode()).hexdigest()
    return found, {"measure": kind.measure, "ids": ids, "values": of_items[kind.measure]}
