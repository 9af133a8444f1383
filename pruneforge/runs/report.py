"""The report of a run: its settings, its result, and what it ran on.

Two reports can be compared with `diff`: keys keep their order, and everything that differs between two runs of the same
recipe comes last, under `measured`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.run import Run
from pruneforge.profile import Profile
from pruneforge.runs.card import license_of
from pruneforge.runs.places import commit_of, hub_id
from pruneforge.runs.provenance import machine, versions
from pruneforge.runs.report_file import FORMAT


def make_report(
    run: Run,
    model: LoadedModel,
    fingerprint: str,
    calibration: Mapping[str, Any] | None,
    peak_memory: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report of a finished run, of types that JSON holds.

    Args:
        run: The finished run.
        model: The pruned model.
        fingerprint: Of the dense model.
        calibration: Description of the calibration data, or `None` if there were none.
        peak_memory: What `PeakMemory.read` returned.
        identity: Everything that determines the bytes of a streamed run; a resumed run must have the same.
    """
    shapes = {layer.name: layer.shape for block in run.blocks for layer in block.layers}
    layers = {
        name: {
            "shape": list(shape),
            "pruned": run.pruned[name],
            "sparsity": round(run.pruned[name] / prod(shape), 6),
            **run.details.get(name, {}),
        }
        for name, shape in shapes.items()
    }
    weights = sum(layer.size for layer in run.excluded) + sum(prod(shape) for shape in shapes.values())
    pruned = sum(run.pruned.values())
    commit = commit_of(model.reference)
    stated = license_of(model.checkpoint.folder if model.checkpoint else Path(model.reference))
    return {
        "format": FORMAT,
        "recipe": run.recipe.model_dump(mode="json"),
        "metric": {"name": run.metric.name, "options": run.metric.options.model_dump(mode="json")},
        "pattern": {
            "pattern": str(run.pattern),
            "scope": getattr(run.pattern, "scope", None) if run.metric.scope else None,
        },
        **_composition(run),
        **({"masks": run.origin} if run.origin is not None else {}),
        "model": {
            "reference": model.reference,
            "on_hub": hub_id(run.recipe.model) is not None,
            "class": type(model.module).__name__,
            "adapter": model.adapter.name,
            "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
            "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
            "fingerprint": fingerprint,
            **({"commit": commit} if commit else {}),
            **({"license": stated} if stated else {}),
        },
        "calibration": calibration,
        "sparsity": {"weights": weights, "pruned": pruned, "reached": round(pruned / weights, 6)},
        "layers": layers,
        "excluded": [layer.name for layer in run.excluded],
        "updated": sorted(run.updated),
        "warnings": run.warnings,
        "evaluation": [],
        "identity": dict(identity),
        "versions": versions(),
        "plugins": run.plugins,
        "measured": {
            **measurements(run.profile, peak_memory),
            "activations_peak": run.activations,
            "gradient_cache": run.gradient_cache,
            **({"profile": run.profile.table()} if run.profile.memory else {}),
            "machine": machine(),
        },
    }


def measurements(profile: Profile, peak_memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return when a run finished, and what it took."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: round(seconds, 3) for stage, seconds in profile.seconds().items()},
        "peak_memory": dict(peak_memory),
    }


def added(
    report: Mapping[str, Any],
    entry: Mapping[str, Any],
    updated: Iterable[str],
    warnings: Sequence[str],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report of a pruned model with a recovery that came afterwards.

    Args:
        report: The report of the pruned model. Its evaluations are left out, since they are of other weights.
        entry: The recovery: its name, options, facts, settings and data.
        updated: Names of the layers and other parameters that it changed.
        warnings: Its warnings.
        measured: What it took.
    """
    earlier = report["measured"].get("recovered", [])
    return {
        **{name: value for name, value in report.items() if name not in ("recovered", "measured")},
        "warnings": list(dict.fromkeys([*report["warnings"], *warnings])),
        "evaluation": [],
        "updated": sorted({*report.get("updated", ()), *updated}),
        "recovered": [*report.get("recovered", []), dict(entry)],
        "measured": {**report["measured"], "recovered": [*earlier, {**measured, "machine": machine()}]},
    }


def _composition(run: Run) -> dict[str, Any]:
    """Return what goes with the metric, as far as anything does."""
    parts: dict[str, Any] = {}
    if run.allocator is not None:
        layers = [layer for block in run.blocks for layer in block.layers]
        parts["allocator"] = {
            "name": run.allocator.name,
            "options": run.allocator.options.model_dump(mode="json"),
            "sparsity": {layer.name: round(run.pattern_for(layer).sparsity, 6) for layer in layers},
            **({"search": run.search} if run.search else {}),
        }
    if run.refiners:
        parts["refiners"] = [
            {"name": refiner.name, "options": refiner.options.model_dump(mode="json")} for refiner in run.refiners
        ]
    for kind, part in {"recovery": run.recovery, "objective": run.objective}.items():
        if part is not None:
            parts[kind] = {"name": part.name, "options": part.options.model_dump(mode="json")}
    if run.recovered:
        parts["recovery"] |= run.recovered
    return parts
