"""`pruneforge.evaluate`: from a model and a task to numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.evaluator import Evaluator, Subject
from pruneforge.interfaces.recipe import EvalRecipe
from pruneforge.plugins import plugins
from pruneforge.progress import Progress, as_progress
from pruneforge.runs import report as reports
from pruneforge.runs.loading import in_evaluation_mode, load_model, parse_device, parse_dtype
from pruneforge.runs.recipe import validated
from pruneforge.runs.result import PruneResult


def evaluate(
    model: str | Path | nn.Module | PruneResult,
    task: str,
    *,
    data: str | Path | None = None,
    window: int | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool | Progress = False,
    processor: Any = None,
) -> dict[str, Any]:
    """Evaluate a model with a task's own harness.

    Args:
        model: A folder, a hub id, a model in memory, or what `prune` returned.
        task: Name of an evaluator, or `name:argument`.
        data: Source or path of the evaluation data, for tasks that take one.
        window: Tokens a window, for tasks that take one.
        include_path: Folder of local task definitions, for tasks that take one.
        limit: Only so many windows, documents or images, for tasks that take it.
        options: Further options of the evaluator.
        source_options: Options of the source of the evaluation data, for tasks that take one.
        batch_size: Samples a batch; `None` lets the evaluator choose.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: Dtype to load or cast the model to; "auto" keeps its own.
        seed: Seed of every random choice.
        output: JSON file to write the results to, with the recipe that repeats them.
        progress: `True` for bars on a terminal.
        processor: Tokenizer or image transform of a model in memory.

    The results for a folder that `prune` wrote are added to its report.

    Returns:
        The evaluator's results, with `task`, `recipe`, `versions` and `warnings`.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit; nothing has been written.
    """
    found = plugins()
    bars = as_progress(progress)
    given = {"data": data, "window": window, "include_path": include_path, "limit": limit}
    values: dict[str, Any] = {key: str(v) if isinstance(v, Path) else v for key, v in given.items() if v is not None}
    values |= dict(options or {})
    if source_options:
        values["source_options"] = dict(source_options)
    evaluator: Evaluator = found.registry.create("evaluator", task, values)
    target, _ = parse_device(device), parse_dtype(dtype)
    if output is not None:
        _check_writable(Path(output))
    if isinstance(model, PruneResult):
        loaded, report, folder = model.loaded, model.report, None
    else:
        loaded = load_model(model, dtype, processor, found.registry)
        folder = Path(loaded.reference) if Path(loaded.reference).is_dir() else None
        report = (reports.load_report(folder) if folder else None) or {}
    recipe = validated(
        EvalRecipe,
        model=loaded.reference,
        task=task,
        options=values,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        plugins=[plugin.origin for plugin in found.loaded if plugin.from_file],
    )
    home = next(loaded.module.parameters()).device
    with in_evaluation_mode(loaded.module):
        try:
            loaded.module.to(target)
            subject = Subject(loaded, target, batch_size, seed, found.registry, report.get("calibration"), bars)
            results = evaluator.evaluate(subject)
        finally:
            loaded.module.to(home)
    warnings = results.pop("warnings", [])
    outcome = {
        "task": task,
        **results,
        "warnings": warnings,
        "recipe": recipe.model_dump(),
        "versions": reports.versions(),
    }
    if folder is not None:
        failed = reports.record_evaluation(folder, outcome)
        outcome["warnings"] += [failed] if failed else []
    if output is not None:
        reports.write_text(json.dumps(outcome, indent=2) + "\n", Path(output))
    return outcome


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise PruneForgeError(
            f"output {str(path)!r} is no file that can be written; name a file in a folder that is there"
        )
