"""Estimate the time, memory and disk of a run, from the model's shapes and a short probe of one block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneforge.checkpoint.skeleton import layer_locations
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.data.calibration import Data
from pruneforge.engine.probe import probe
from pruneforge.engine.processes import Group
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.statistics import empty_statistics, kind_of, of_model_gradients
from pruneforge.memory import one_line_for_full_devices
from pruneforge.numerics import exact_arithmetic
from pruneforge.runs.job import make_job
from pruneforge.runs.loading import in_evaluation_mode

META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        blocks: How many blocks the model has.
        layers: How many layers will be pruned.
        weights: How many weights these have.
        pruned: Approximate number of them that will be pruned (each comparison group rounds down).
        host_bytes: Peak of host memory.
        device_bytes: Peak of memory on the CUDA device.
        disk_bytes: Bytes to write: output, gradient statistics, and hidden states that do not fit in memory.
        seconds: Seconds of each stage, without writing.
    """

    blocks: int
    layers: int
    weights: int
    pruned: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    seconds: dict[str, float]

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
        raise PruneForgeError("an estimate is for one pattern; give `sparsity` or `pattern`")
    job = make_job(model, metric, calibration, **settings)
    session = job.open(Group(), streamed=not isinstance(model, nn.Module))
    (run,), loaded, batches = session.runs, session.loaded, session.data.batches
    with (
        exact_arithmetic(run.seed, job.device),
        in_evaluation_mode(loaded.module),
        torch.no_grad(),
        one_line_for_full_devices(),
    ):
        seconds, waiting = probe(loaded, batches, run, job.device)
    measured = session.peak.read()
    on_device = job.device.type == "cuda"
    host_room, device_room = session.rooms([run])
    waits_on_device = min(waiting, device_room)
    waits_on_host = min(waiting - waits_on_device, host_room)
    layers = [layer for block in run.blocks for layer in block.layers]
    weights = sum(layer.size for layer in layers)
    gradients = [kind for kind in map(kind_of, run.requires) if of_model_gradients(kind)]
    statistics = sum(
        made.total.nbytes for kind in gradients for la in layers for made in empty_statistics(la, [kind], META).values()
    )
    disk = waiting - waits_on_device - waits_on_host
    if loaded.checkpoint is not None:
        stored = layer_locations(loaded.module, run.blocks, loaded.checkpoint)
        disk += statistics + Rewrite(loaded.checkpoint, Path(), stored, permuted=run.metric.permutes).bytes_needed()
    return Estimate(
        blocks=len(run.blocks),
        layers=len(layers),
        weights=weights,
        pruned=int(weights * run.pattern.sparsity),
        host_bytes=measured["host_bytes"] + waits_on_host,
        device_bytes=(measured["device_bytes"] + waits_on_device) if on_device else 0,
        disk_bytes=disk,
        seconds=seconds,
    )
