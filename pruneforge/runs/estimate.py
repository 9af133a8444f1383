"""Estimate the time, memory and disk of a run, from the model's shapes and a short probe of one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pruneforge.checkpoint.skeleton import layer_locations
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.data.calibration import Data
from pruneforge.engine.probe import probe
from pruneforge.engine.processes import Group
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import empty_statistics, kind_of, of_model_gradients
from pruneforge.memory import one_line_for_full_devices
from pruneforge.numerics import exact_arithmetic
from pruneforge.runs.job import Job, make_job, refuse_single_pattern
from pruneforge.runs.loading import in_evaluation_mode
from pruneforge.runs.parts import Metrics
from pruneforge.wide_products import wide_products

META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        blocks: How many blocks the model has.
        layers: How many layers will be pruned.
        weights: How many weights these have, in each model that is made.
        pruned: Approximate number of them that will be pruned (each comparison group rounds down), of all models.
        host_bytes: Peak of host memory.
        device_bytes: Peak of memory on the CUDA device.
        disk_bytes: Bytes to write: output, gradient statistics, and hidden states that do not fit in memory.
        seconds: Seconds of each stage, without writing.
        models: How many models one pass makes.
    """

    blocks: int
    layers: int
    weights: int
    pruned: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    seconds: dict[str, float]
    models: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by name, of types that JSON holds."""
        return asdict(self)


def estimate(
    model: str | Path | nn.Module, metric: str | Metric, calibration: Data | None = None, **settings: Any
) -> Estimate:
    """Estimate what `prune` with the same arguments would take; nothing is written or changed.

    One block is read, calibrated with one batch and scored; the rest is extrapolated. For a folder or hub id, a run
    with an output is assumed. Recovery of the whole model is left out.

    Args:
        model: As for `prune`.
        metric: As for `prune`.
        calibration: As for `prune`.
        settings: Every other argument of `prune`, by name.

    Raises:
        PruneForgeError: As `prune` does.
    """
    if "patterns" in settings:
        raise PruneForgeError("an estimate is for one pattern; give `sparsity` or `pattern`, or call `estimate_each`")
    return _estimated(make_job(model, metric, calibration, **settings))


def estimate_each(
    model: str | Path,
    metric: Metrics,
    patterns: Sequence[float | str],
    calibration: Data | None = None,
    *,
    output: str | Path = "",
    propagate: Literal["pruned", "dense"] = "dense",
    **settings: Any,
) -> Estimate:
    """Estimate what `prune_each` with the same arguments would take, as `estimate` does; nothing is written.

    Args:
        model: As for `prune_each`.
        metric: As for `prune_each`.
        patterns: As for `prune_each`.
        calibration: As for `prune_each`.
        output: As for `prune_each`; need not be given.
        propagate: As for `prune_each`.
        settings: Every other argument of `prune_each`, by name.

    Raises:
        PruneForgeError: As `prune_each` does.
    """
    refuse_single_pattern(settings)
    chosen = {"patterns": patterns, "output": output, "propagate": propagate, **settings}
    return _estimated(make_job(model, metric, calibration, **chosen))


def _estimated(job: Job) -> Estimate:
    """Estimate the pass of a job."""
    session = job.open(Group(), streamed=not isinstance(job.model, nn.Module))
    runs, loaded, batches = session.runs, session.loaded, session.data.batches
    if loaded.checkpoint is None:
        job.refuse_what_streams(loaded.note or "this one is not")
    blocks = runs[0].blocks
    with (
        exact_arithmetic(runs[0].seed, job.device),
        in_evaluation_mode(loaded.module),
        wide_products(loaded.module, job.device),
        torch.no_grad(),
        one_line_for_full_devices(),
    ):
        seconds, waiting = probe(loaded, batches, runs, job.device)
    measured = session.peak.read()
    on_device = job.device.type == "cuda"
    host_room, device_room = session.rooms(runs)
    waits_on_device = min(waiting, device_room)
    waits_on_host = min(waiting - waits_on_device, host_room)
    layers = [layer for block in blocks for layer in block.layers]
    weights = sum(layer.size for layer in layers)
    disk = waiting - waits_on_device - waits_on_host
    if loaded.checkpoint is not None:
        stored = layer_locations(loaded.module, blocks, loaded.checkpoint)
        rewrites = (Rewrite(loaded.checkpoint, Path(), stored, permuted=run.metric.permutes) for run in runs)
        disk += _gradient_bytes(runs, layers) + sum(rewrite.bytes_needed() for rewrite in rewrites)
    return Estimate(
        blocks=len(blocks),
        layers=len(layers),
        weights=weights,
        pruned=sum(int(weights * run.pattern.sparsity) for run in runs),
        host_bytes=measured["host_bytes"] + waits_on_host,
        device_bytes=(measured["device_bytes"] + waits_on_device) if on_device else 0,
        disk_bytes=disk,
        seconds=seconds,
        models=len(runs),
    )


def _gradient_bytes(runs: Sequence[Run], layers: Sequence[Layer]) -> int:
    """Return the bytes of the gradient statistics that runs keep, which they share."""
    required = dict.fromkeys(kind_of(required) for run in runs for required in run.requires)
    kinds = [kind for kind in required if of_model_gradients(kind)]
    return sum(
        made.total.nbytes for kind in kinds for la in layers for made in empty_statistics(la, [kind], META).values()
    )
