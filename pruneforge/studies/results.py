"""What the cells of a study found, as rows: one for each cell and task, with everything it was measured on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.plan import Cell
from pruneforge.studies.published import published_dense, published_for

Row = dict[str, Any]

TASK_PROTOCOL = ("window", "windows", "tokens", "images", "image_size", "crop", "labels", "skipped")
"""What an evaluation may say of the data that it measured on, beside where they come from."""


def rows_of(cells: Sequence[Cell], held: StudyFolder) -> list[Row]:
    """Return a row for each cell and task, and one for each failed cell, in the order of the study.

    Returns:
        Rows with the cell (`model`, `method`, `pattern`, `seed`) and its `recipe` hash; what it was calibrated
        on (`calibration`, `source_options`, `streams`, `samples`, `seqlen`, `calibration_tokens`) and how
        (`propagate`, `dtype`, `scope`); the task (`task`, its `task_number` among the model's, `task_options`)
        with its protocol (`data`, `split` and `TASK_PROTOCOL`); `sparsity`, `measure`, `value`, `dense`, what
        `published` returns, `loss`, `dense_loss`, `loss_increase` (relative to the dense model's); the shares
        that rows and columns explain of masks (`mask_rows`), of random masks and, where they are known, of
        scores; `versions`; and `failed`, the reason or an empty text.
    """
    rows = []
    for cell in cells:
        found = held.cell(cell)
        if found is None:
            continue
        calibrated = _calibrated(cell)
        if "failed" in found:
            rows.append({**calibrated, "failed": found["failed"]})
            continue
        pruned = _pruned(found)
        for number, evaluation in enumerate(found["evaluations"]):
            outcome = _outcome(cell, evaluation, _dense(held, cell, number))
            task = {"task_number": number, "task_options": as_text(cell.tasks[number].options)}
            rows.append({**calibrated, **task, **outcome, **pruned, "failed": ""})
    return rows


def _dense(held: StudyFolder, cell: Cell, number: int) -> dict[str, Any]:
    found = held.dense(cell.model, number) or {}
    return {} if "failed" in found else found


def published(cell: Cell, evaluation: Mapping[str, Any]) -> Row:
    """Return the numbers that were published for a cell's evaluation and for its dense model, and where, if any are."""
    found = {"published": published_for(cell, evaluation), "published_dense": published_dense(cell, evaluation)}
    values = {name: number.value if number else None for name, number in found.items()}
    return values | {f"{name}_source": number.source if number else "" for name, number in found.items()}


def as_text(values: Mapping[str, Any]) -> str:
    """Return names and values in one line: `data c4, window 2048`; what is not set is left out."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items() if values[name] is not None)


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _calibrated(cell: Cell) -> Row:
    recipe = cell.recipe
    return {
        "model": cell.model,
        "method": cell.method,
        "pattern": str(cell.pattern),
        "seed": cell.seed,
        "recipe": cell.fingerprint(),
        "reference": recipe.model,
        "calibration": recipe.calibration or "",
        "source_options": as_text(recipe.source_options),
        "streams": as_text(recipe.streams),
        "samples": recipe.samples,
        "seqlen": recipe.seqlen or "",
        "propagate": recipe.propagate,
    }


def _pruned(found: Mapping[str, Any]) -> Row:
    masks = found["masks"]
    return {
        "scope": found["scope"] or "",
        "dtype": found.get("dtype", ""),
        "calibration_tokens": found.get("calibration_tokens") or "",
        "sparsity": found["sparsity"],
        **{f"mask_{way}": masks[way] for way in ("rows", "columns")},
        **{f"random_{way}": masks[f"random_{way}"] for way in ("rows", "columns")},
        **_of_scores(found.get("details", {})),
        "versions": as_text(found["versions"]),
    }


def _of_scores(details: Mapping[str, Any]) -> Row:
    """Return the shares of the scores' variance that rows and columns explain, layers weighted by their size."""
    scores = [layer["scores"] for layer in details.values() if layer["scores"]]
    weights = sum(each["weights"] for each in scores)
    if not weights:
        return {}
    return {
        f"score_{way}": sum(each[way] * each["weights"] for each in scores) / weights for way in ("rows", "columns")
    }


def _outcome(cell: Cell, evaluation: Mapping[str, Any], dense: Mapping[str, Any]) -> Row:
    measure, data = evaluation["measure"], dict(evaluation.get("data") or {})
    loss, dense_loss = evaluation.get("loss"), dense.get("loss")
    return {
        "task": evaluation["task"],
        "data": as_text(data),
        "split": data.get("split") or data.get("part") or "",
        **{name: evaluation[name] for name in TASK_PROTOCOL if name in evaluation},
        "measure": measure,
        "higher_is_better": evaluation["higher_is_better"],
        "share": evaluation["share"],
        "value": evaluation.get(measure),
        "dense": dense.get(measure),
        **published(cell, evaluation),
        "loss": loss,
        "dense_loss": dense_loss,
        "loss_increase": loss / dense_loss - 1 if loss is not None and dense_loss else None,
    }
