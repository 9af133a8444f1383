"""`pruneforge.compare`: the same pruning of several models, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruneforge.data.calibration import Data
from pruneforge.errors import PruneForgeError
from pruneforge.progress import Progress, as_progress
from pruneforge.runs.evaluate import evaluate
from pruneforge.runs.prune import prune

CLASSES_SHOWN = 10
"""Number of classes that a row names, those that lost most accuracy."""


@dataclass(frozen=True)
class Case:
    """One model with its calibration data and its task.

    Attributes:
        model: A folder or hub id, loaded anew for every metric.
        task: The evaluator, as `evaluate` takes it; its results must hold a `loss`.
        task_options: The evaluator's options.
        calibration: Source, path or batches.
        samples: Sequences or images to draw.
        seqlen: Tokens a sequence, for text.
        name: Name of the case in the table; the model by default.
    """

    model: str | Path
    task: str
    task_options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Data | None = None
    samples: int = 128
    seqlen: int | None = None
    name: str = ""


def compare(
    cases: Sequence[Case],
    metrics: Sequence[str],
    sparsity: float | None = None,
    pattern: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool | Progress = False,
) -> list[dict[str, Any]]:
    """Prune every case by every metric, with the same pattern, options and seed, and evaluate it.

    Args:
        cases: The models, of any architecture, with their data and tasks.
        metrics: Names of metrics.
        sparsity: As `prune` takes it.
        pattern: As `prune` takes it.
        options: Options that all the metrics take.
        device: As `prune` takes it.
        seed: Seed of every random choice.
        progress: `True` for bars on a terminal.

    Returns:
        A row for each case and metric, with `model`, `metric`, `pattern`, `sparsity` reached, `loss`, `dense_loss`,
        `loss_increase` (relative to the dense loss), `accuracy` and `accuracy_lost` (shares; `None` where the task
        has no accuracy), `classes_lost` (the classes that pruning hurt most, with the accuracy each lost),
        `seconds`, `peak_memory_bytes`, `warnings`, and the evaluator's whole `results`.

    Raises:
        PruneForgeError: As `prune` and `evaluate` raise it.
    """
    bars = as_progress(progress)
    rows = []
    for case in cases:
        common: dict[str, Any] = {"device": device, "seed": seed, "progress": bars}
        dense = evaluate(case.model, case.task, options=case.task_options, **common)
        if not dense.get("loss"):
            raise PruneForgeError(f"task {case.task!r} reports no loss to compare by")
        for metric in bars.track(metrics, case.name or str(case.model)):
            pruned = prune(
                case.model,
                metric,
                sparsity,
                pattern,
                case.calibration,
                samples=case.samples,
                seqlen=case.seqlen,
                options=options,
                **common,
            )
            outcome = evaluate(pruned, case.task, options=case.task_options, **common)
            rows.append(_row(case, pruned.report, dense, outcome))
    return rows


def _row(case: Case, report: Mapping[str, Any], dense: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    accuracy, before = outcome.get("top1"), dense.get("top1")
    return {
        "model": case.name or str(case.model),
        "metric": report["metric"]["name"],
        "pattern": report["pattern"]["pattern"],
        "sparsity": report["sparsity"]["reached"],
        "dense_loss": dense["loss"],
        "loss": outcome["loss"],
        "loss_increase": outcome["loss"] / dense["loss"] - 1,
        "accuracy": accuracy,
        "accuracy_lost": None if accuracy is None or before is None else before - accuracy,
        "classes_lost": _classes_lost(dense.get("class_accuracy"), outcome.get("class_accuracy")),
        "seconds": report["measured"]["seconds"]["total"],
        "peak_memory_bytes": report["measured"]["peak_memory"]["host_bytes"],
        "warnings": [*report["warnings"], *outcome["warnings"]],
        "results": dict(outcome),
    }


def _classes_lost(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float] | None:
    if before is None or after is None:
        return None
    lost = {name: round(accuracy - after[name], 6) for name, accuracy in before.items() if after[name] < accuracy}
    return dict(sorted(lost.items(), key=lambda item: -item[1])[:CLASSES_SHOWN])
