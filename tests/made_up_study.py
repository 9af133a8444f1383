"""The folder of a study with made-up numbers, as if it had run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pruneforge.studies.plan import Cell, cells_of
from pruneforge.studies.results import Row
from pruneforge.studies.study import Study, make_study, save_study

PERPLEXITY = {"task": "perplexity", "options": {"data": "python-docs", "window": 64}}
ACCURACY = {"task": "imagenet", "options": {"data": "digits"}}


def model(*tasks: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"model": "demo:text", "calibration": "python-docs", "samples": 8, "tasks": [*tasks], **settings}


def made_up(folder: Path, change: Callable[[Cell, dict[str, Any]], None] | None = None, **values: Any) -> Any:
    """Return a study and its cells, after writing what they found.

    Args:
        folder: The study's folder, new.
        change: Is given each cell and what it found, to change it.
        values: The study.
    """
    study = make_study({"models": {"text": model(PERPLEXITY), "image": model(ACCURACY)}, **values})
    cells = cells_of(study, [])
    folder.mkdir(exist_ok=True)
    save_study(study, folder)
    random = np.random.default_rng(0)
    for name, of_model in study.models.items():
        for number, task in enumerate(of_model.tasks):
            write(folder / "dense" / name / f"{number}.json", evaluation(task.task, task.options, 0.0))
    for cell in cells:
        found = outcome(study, cell, random)
        if change:
            change(cell, found)
        place = folder / "cells" / cell.key
        for number, outcomes in enumerate(found.pop("items", [])):
            write(place / f"items-{number}.json", outcomes)
        write(place / "cell.json", found)
        seconds = float(random.uniform(1, 2))
        write(place / "measured.json", {"seconds": seconds, "runs_in_the_pass": 1, "peak_bytes": 1 << 30, "stages": {}})
    return study, cells


def row(method: str, seed: int, value: float, pattern: str = "0.5", **changes: Any) -> Row:
    """Return what a cell found, as a row of the results."""
    texts = "reference calibration source_options streams seqlen propagate dtype scope versions task_options data"
    sources = ("published_source", "published_dense_source")
    return dict.fromkeys((*texts.split(), *sources), "") | {
        "model": "m",
        "task": "t",
        "task_number": 0,
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "measure": "perplexity",
        "higher_is_better": False,
        "share": False,
        "value": value,
        "dense": 5.0,
        "loss_increase": None,
        "samples": 8,
        "failed": "",
        "published": None,
        "published_dense": None,
        **changes,
    }


def write(file: Path, found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))


def outcome(study: Study, cell: Cell, random: np.random.Generator) -> dict[str, Any]:
    harm = 0.2 * (1 + list(study.all_methods()).index(cell.method)) * float(random.uniform(0.9, 1.1))
    scoped = isinstance(cell.pattern, float)
    found = {
        "asked": cell.asked(),
        "sparsity": 0.5,
        "scope": "row" if scoped else None,
        "evaluations": [evaluation(task.task, task.options, harm) for task in cell.tasks],
        "masks": {
            "rows": 0.0,
            "columns": 0.04,
            "random_rows": 0.01,
            "random_columns": 0.02,
            "layers": {name: 0.5 + 0.1 * random.uniform() for name in layer_names()},
        },
        "warnings": [],
        "versions": {"pruneforge": "1.2.3", "torch": "2.9.0"},
    }
    if "details" in cell.keeps:
        scores = {"low": -3.0, "high": 1.0, "counts": [1, 4, 9, 2], "others": 0, "rows": 0.1, "columns": 0.3}
        found["details"] = {name: {"error": harm, "scores": {**scores, "weights": 16}} for name in layer_names()}
        found["picture"] = {"layer": "blocks.1.attn.proj", "shape": [8, 4], "png": png()}
    return found


def layer_names() -> Iterator[str]:
    yield from (f"blocks.{block}.{role}" for block in range(3) for role in ("attn.proj", "mlp.fc1"))


def png() -> str:
    file = io.BytesIO()
    Image.fromarray(np.eye(8, 4, dtype=np.uint8) * np.uint8(255)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def evaluation(task: str, options: dict[str, Any], harm: float) -> dict[str, Any]:
    """Return what a model gives that lost `harm` nats."""
    common = {"task": task, "loss": 2.0 + harm, "data": {"source": options["data"], "split": "test"}, "warnings": []}
    if task == "perplexity":
        said = {"perplexity": float(np.exp(2.0 + harm)), "window": options["window"], "tokens": 4096}
        return {**common, **said, "measure": "perplexity", "higher_is_better": False, "share": False}
    said = {"top1": 0.8 - 0.1 * harm, "images": 50_000, "image_size": 224, "crop": 0.875}
    return {**common, **said, "measure": "top1", "higher_is_better": True, "share": True}
