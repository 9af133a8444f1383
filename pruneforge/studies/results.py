"""What the cells of a study found: a row for each, and what rows of several calibration draws say together."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.study import Cell

Row = dict[str, Any]

RESAMPLES = 2000
"""Bootstrap samples of a paired difference."""


def rows_of(cells: Sequence[Cell], held: StudyFolder) -> list[Row]:
    """Return a row for each cell and task, and one for each failed cell, in the order of the study.

    Returns:
        Rows with the cell (`model`, `method`, `pattern`, `seed`), its protocol (`samples`, `seqlen`, `calibration`,
        `scope`, `propagate`, `dtype`, `recipe`), `sparsity`, `task`, `measure`, `value`, `dense`, `loss`, `dense_loss`,
        `loss_increase` (relative to the dense model's), the `rows` and `columns` structure of the masks and of random
        ones, the protocol of the task (`window`, `tokens`, `images`), and `failed`, the reason or an empty text.
    """
    rows = []
    for cell in cells:
        found = held.cell(cell)
        if found is None:
            continue
        protocol = _protocol(cell)
        if "failed" in found:
            rows.append({**protocol, "failed": found["failed"]})
            continue
        for number, evaluation in enumerate(found["evaluations"]):
            dense = held.dense(cell.model, number) or {}
            rows.append({**protocol, **_outcome(found, evaluation, dense), "failed": ""})
    return rows


def _protocol(cell: Cell) -> Row:
    recipe = cell.recipe
    return {
        "model": cell.model,
        "method": cell.method,
        "pattern": str(cell.pattern),
        "seed": cell.seed,
        "calibration": recipe.calibration or "",
        "samples": recipe.samples,
        "seqlen": recipe.seqlen or "",
        "propagate": recipe.propagate,
        "dtype": recipe.dtype,
        "recipe": cell.fingerprint(),
    }


def _outcome(found: Mapping[str, Any], evaluation: Mapping[str, Any], dense: Mapping[str, Any]) -> Row:
    measure, masks = evaluation["measure"], found["masks"]
    loss, dense_loss = evaluation.get("loss"), dense.get("loss")
    return {
        "scope": found["scope"] or "",
        "sparsity": found["sparsity"],
        "task": evaluation["task"],
        "measure": measure,
        "higher_is_better": evaluation["higher_is_better"],
        "share": evaluation["share"],
        "value": evaluation.get(measure),
        "dense": dense.get(measure),
        "loss": loss,
        "dense_loss": dense_loss,
        "loss_increase": loss / dense_loss - 1 if loss is not None and dense_loss else None,
        "mask_rows": masks["rows"],
        "mask_columns": masks["columns"],
        "random_rows": masks["random_rows"],
        "random_columns": masks["random_columns"],
        **{name: evaluation[name] for name in ("window", "tokens", "images") if name in evaluation},
    }


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Summary:
    """One method at one pattern on one task, over all calibration draws.

    Attributes:
        model: Name of the model.
        task: The task.
        method: Name of the method.
        pattern: Sparsity or N:M.
        values: The measure, by seed.
        mean: Their mean.
        deviation: Their standard deviation, with one draw less in the divisor; `None` with one draw.
        loss_increase: Mean increase of the loss relative to the dense model; `None` where the task has no loss.
        difference: Mean difference to the baseline on the same draws; `None` for the baseline.
        low: Lower end of its 95 % bootstrap interval over draws; `None` with fewer than two.
        high: Upper end.
    """

    model: str
    task: str
    method: str
    pattern: str
    values: dict[int, float]
    mean: float
    deviation: float | None
    loss_increase: float | None
    difference: float | None
    low: float | None
    high: float | None


def summaries(rows: Sequence[Row], baseline: str) -> list[Summary]:
    """Return a summary for each model, task, method and pattern, in the order of the rows."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("value") is not None:
            groups.setdefault((row["model"], row["task"], row["method"], row["pattern"]), []).append(row)
    found = []
    for (model, task, method, pattern), own in groups.items():
        values = {row["seed"]: float(row["value"]) for row in own}
        base = {row["seed"]: float(row["value"]) for row in groups.get((model, task, baseline, pattern), [])}
        pairs = [values[seed] - base[seed] for seed in values if seed in base] if method != baseline else []
        low, high = interval(pairs)
        losses = [row["loss_increase"] for row in own if row["loss_increase"] is not None]
        found.append(
            Summary(
                model,
                task,
                method,
                pattern,
                values,
                statistics.fmean(values.values()),
                statistics.stdev(values.values()) if len(values) > 1 else None,
                statistics.fmean(losses) if losses else None,
                statistics.fmean(pairs) if pairs else None,
                low,
                high,
            )
        )
    return found


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % bootstrap interval of the mean of paired differences; of fewer than two there is none."""
    if len(differences) < 2 or any(math.isinf(each) or math.isnan(each) for each in differences):
        return None, None
    if len(set(differences)) == 1:
        return differences[0], differences[0]
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(differences),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
