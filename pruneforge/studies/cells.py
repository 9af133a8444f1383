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
from pruneforge.errors import DeviceFullError, PruneForgeError, UnfinishedError
from pruneforge.interfaces.evaluator import Evaluator
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.evaluate import evaluate
from pruneforge.runs.inspect import masks_in_short
from pruneforge.runs.loading import load_model
from pruneforge.runs.prune import prune, prune_each
from pruneforge.runs.result import PruneResult
from pruneforge.studies.folder import CELL_FILE, MEASURED_FILE, as_json, dense_place, items_file, place_of
from pruneforge.studies.plan import Cell
from pruneforge.studies.study import Task

PICTURED = 96
"""Rows and columns of the part of a mask that is kept as a picture."""

DISK_SHARE = 0.8
"""Share of the free disk that the models of a pass may take before they are evaluated."""

Found = tuple[str, bytes]
"""Where a file belongs below the study's folder, and what it holds."""


class Work(ABC):
    """A part of a study that one process does."""

    @abstractmethod
    def run(self, work: Path, sharing: int = 1) -> Iterator[Found]:
        """Do it, and yield what was found, a cell's own file last.

        Args:
            work: A folder for what the work writes meanwhile.
            sharing: How many processes share the disk.

        Raises:
            UnfinishedError: Something stopped it that is not to blame on the work, such as a full disk.
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
        dtype: Dtype to compute in, as the pruned models do.
    """

    label: str
    model: str
    number: int
    task: Task
    device: str
    dtype: str

    def asked(self) -> dict[str, Any]:
        """Return everything that decides the outcome, of types that JSON holds."""
        return {"model": self.model, "dtype": self.dtype, "task": self.task.model_dump(mode="json")}

    def run(self, work: Path, sharing: int = 1) -> Iterator[Found]:
        """Evaluate the model."""
        try:
            found, _ = _evaluated(self.model, self.task, self.device, items=False, dtype=self.dtype)
        except Exception as error:  # plugins may fail in any way
            found = {"failed": _reason(error)}
        yield dense_place(self.label, self.number), as_json({"asked": self.asked(), **found})


@dataclass(frozen=True)
class Pass(Work):
    """Cells of one model and draw that one pass over the calibration data makes.

    Attributes:
        cells: The cells; they differ in metric, options and pattern alone.
    """

    cells: tuple[Cell, ...]

    def run(self, work: Path, sharing: int = 1) -> Iterator[Found]:
        """Make the cells, as many together as the disk has room for; where that fails, each alone."""
        at_once = _models_that_fit(self.cells[0], work, sharing) if len(self.cells) > 1 else 1
        for some in products(self.cells, at_once):
            yield from _made(some, work)


def passes(cells: Sequence[Cell]) -> list[Pass]:
    """Return the passes that make cells: one for those of a model and draw with the same parts beside the metric."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = cell.recipe.model_dump(exclude={"metric", "options", "sparsity", "pattern", "plugins"})
        alone = cell.key if cell.recipe.propagate == "pruned" else ""
        groups.setdefault(json.dumps([cell.model, alone, shared], sort_keys=True), []).append(cell)
    return [Pass(tuple(group)) for group in groups.values()]


def products(cells: Sequence[Cell], at_once: int) -> Iterator[list[Cell]]:
    """Yield the cells in parts of at most `at_once`, each all of some methods by all of some patterns.

    One call of `prune_each` makes such a part, and no model that nobody asked for.
    """
    of_method: dict[str, list[Cell]] = {}
    for cell in cells:
        of_method.setdefault(cell.method, []).append(cell)
    alike: dict[tuple[float | str, ...], list[list[Cell]]] = {}
    for own in of_method.values():
        alike.setdefault(tuple(cell.pattern for cell in own), []).append(own)
    for patterns, methods in alike.items():
        width = min(len(patterns), at_once)
        height = max(1, at_once // width)
        for top in range(0, len(methods), height):
            for left in range(0, len(patterns), width):
                yield [cell for own in methods[top : top + height] for cell in own[left : left + width]]


def arguments(cell: Cell) -> dict[str, Any]:
    """Return the arguments of `prune` that make a cell."""
    settings: dict[str, Any] = cell.recipe.model_dump(exclude={"plugins"})
    given = {name: value for name, value in settings.items() if value is not None}
    return {**given, "details": "details" in cell.keeps}


def _made(cells: Sequence[Cell], work: Path, alone_because: str = "") -> Iterator[Found]:
    """Prune to make cells, and yield what was found; their models are gone from the disk afterwards.

    Args:
        cells: All of some methods by all of some patterns.
        work: A folder to prune into.
        alone_because: Why a pass that would have made more failed.
    """
    folder = work / "pass"
    try:
        results = _pruned(cells, folder)
    except Exception as error:
        if isinstance(error, UnfinishedError) and not isinstance(error, DeviceFullError):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        if len(cells) == 1:
            yield _failure(cells[0], error)
            return
        for cell in cells:  # alone each takes less, and says for itself why it fails
            yield from _made([cell], work, _reason(error))
        return
    try:
        for cell, result in zip(cells, results, strict=True):
            try:
                found = _finished(cell, result, len(cells), alone_because)
            except Exception as error:  # an evaluation of this model alone
                found = [_failure(cell, error)]
            yield from found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pruned(cells: Sequence[Cell], folder: Path) -> Iterator[PruneResult]:
    """Prune, and return an iterator over the cells' results, which are read from the folder one by one."""
    settings = arguments(cells[0])
    if len(cells) == 1:
        return iter([prune(**settings, output=folder)])
    for name in ("metric", "options", "sparsity", "pattern"):
        settings.pop(name, None)
    labels = {method: f"m{number}" for number, method in enumerate(dict.fromkeys(cell.method for cell in cells))}
    metrics = {labels[cell.method]: cell.recipe.metric for cell in cells}
    options = {labels[cell.method]: cell.recipe.options for cell in cells}
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    if len(metrics) == 1:
        options = next(iter(options.values()))
    results = prune_each(metric=metrics, patterns=patterns, options=options, output=folder, **settings)
    texts = [str(cell.pattern).replace(":", "of") for cell in cells]
    named = [
        text if len(metrics) == 1 else f"{labels[cell.method]}-{text}" for cell, text in zip(cells, texts, strict=True)
    ]
    return (results.pop(name) for name in named)  # so that each model can go once it is evaluated


def _models_that_fit(cell: Cell, work: Path, sharing: int) -> int:
    """Return how many models of a cell's size the disk has room for, with some to spare; at least one."""
    recipe, registry = cell.recipe, loaded_plugins().registry
    loaded = load_model(recipe.model, recipe.dtype, None, registry, recipe.adapter_options, on_disk=True)
    if loaded.checkpoint is None:
        return 1  # it cannot be streamed, so nothing is shared
    size = sum(path.stat().st_size for path in loaded.checkpoint.folder.glob("*.safetensors"))
    return max(1, int(DISK_SHARE / sharing * shutil.disk_usage(work).free) // max(1, size))


def _failure(cell: Cell, error: Exception) -> Found:
    return place_of(cell, CELL_FILE), as_json({"asked": cell.asked(), "failed": _reason(error)})


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, PruneForgeError) else f"{type(error).__name__}: {said}"


def _finished(cell: Cell, result: PruneResult, together: int, alone_because: str) -> list[Found]:
    """Evaluate a cell's model, and return what was found."""
    wants_items = "items" in cell.keeps
    outcomes = [_evaluated(result, task, cell.recipe.device, wants_items) for task in cell.tasks]
    report = result.report
    seconds, peak = report["measured"]["seconds"], report["measured"]["peak_memory"]
    measured = {
        "seconds": seconds["total"],
        "runs_in_the_pass": together,
        "alone_because": alone_because,
        "peak_bytes": peak["host_bytes"],
        "peak_device_bytes": peak.get("device_bytes"),
        "stages": seconds,
    }
    kept: list[Found] = [(place_of(cell, MEASURED_FILE), as_json(measured))]
    if "masks" in cell.keeps:
        kept.append((place_of(cell, MASKS_FILE), masks_file(result.masks, result.permutations)))
    for number, (_, items) in enumerate(outcomes) if wants_items else ():
        kept.append((place_of(cell, items_file(number)), as_json(items)))
    found = _found(cell, result, [outcome for outcome, _ in outcomes])
    return [*kept, (place_of(cell, CELL_FILE), as_json(found))]


def _found(cell: Cell, result: PruneResult, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a cell's own file holds."""
    report = result.report
    found = {
        "asked": cell.asked(),
        "sparsity": report["sparsity"]["reached"],
        "scope": report["pattern"]["scope"],
        "dtype": report["model"]["dtype"],
        "calibration_tokens": (report["calibration"] or {}).get("tokens"),
        "evaluations": evaluations,
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
    return found


def _picture(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the corner of the mask of the layer in the middle, kept weights white, as a PNG in base64."""
    from PIL import Image

    names = list(masks)
    layer = names[len(names) // 2]
    corner = masks[layer][:PICTURED, :PICTURED]
    file = io.BytesIO()
    Image.fromarray(corner.numpy() * np.uint8(255)).convert("1").save(file, "PNG")
    return {"layer": layer, "shape": list(corner.shape), "png": base64.b64encode(file.getvalue()).decode()}


def _evaluated(
    model: str | PruneResult, task: Task, device: str, items: bool, dtype: str = "auto"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an evaluation without what differs between two runs of it, and the outcome of each item."""
    outcome = evaluate(
        model, task.task, task.options, batch_size=task.batch_size, device=device, dtype=dtype, items=items
    )
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
