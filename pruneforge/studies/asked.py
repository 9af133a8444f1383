"""Studies as a command line asks for them: models that share data and task, metrics that share all but options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneforge.errors import PruneForgeError
from pruneforge.runs.parts import by_label, options_by_label
from pruneforge.studies.study import OF_METHOD, OF_MODEL


def study_values(
    models: Sequence[str],
    metrics: Sequence[str],
    task: Mapping[str, Any],
    patterns: Sequence[float | str],
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return the plain values of a study.

    Args:
        models: Folders or hub ids.
        metrics: Names of metrics.
        task: What each pruned model is evaluated on: `task` and its `options`.
        patterns: Sparsities and N:M.
        options: Options of the metric; of several metrics, by name.
        settings: Settings of the recipe for models or metrics, and of the study.

    Raises:
        PruneForgeError: A model or a metric is named twice, or options are of a metric that is not.
    """
    own = options_by_label(by_label(list(metrics)), options or {}, "metric")
    of_model = {name: settings.pop(name) for name in OF_MODEL if name in settings}
    of_method = {name: settings.pop(name) for name in OF_METHOD if name in settings}
    return {
        "models": {name: {"model": model, "tasks": [task], **of_model} for name, model in _names(models).items()},
        "methods": {name: {"metric": name, "options": chosen, **of_method} for name, chosen in own.items()},
        "patterns": list(patterns),
        **settings,
    }


def _names(models: Sequence[str]) -> dict[str, str]:
    """Return the models by what the report calls them: the last part of a folder or hub id, or all if that is taken."""
    names: dict[str, str] = {}
    for model in models:
        last = Path(model).resolve().name if Path(model).exists() else re.split("[/:]", model)[-1]
        short, whole = (re.sub(r"[^\w.,+-]+", "-", text) for text in (last, model))
        name = (whole if short in names else short).lstrip(".-")
        if model in names.values() or name in names:
            raise PruneForgeError(f"model {model!r} is named twice, or another has its name")
        names[name] = model
    return names
