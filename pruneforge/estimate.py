"""What a run will take, from its model's shapes and a short probe of one block."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pruneforge.arithmetic import exact_arithmetic, seed_random_numbers
from pruneforge.calibration import Calibration, Data
from pruneforge.checkpoint.rewrite import Rewrite
from pruneforge.engine.calibrate import InputRecorder
from pruneforge.engine.chain import Activations, Chain
from pruneforge.engine.gradients import block_gradients, update
from pruneforge.engine.group import Group
from pruneforge.engine.residency import InMemory, Residency
from pruneforge.engine.run import Run
from pruneforge.engine.streamed import Streamed, stored_layers
from pruneforge.job import Job, make_job
from pruneforge.memory import PeakMemory, one_line_for_full_devices
from pruneforge.metric import Metric
from pruneforge.model import LoadedModel, in_evaluation_mode
from pruneforge.statistics import GradientStatistic, InputStatistic, LayerStatistics, empty_statistics

T = TypeVar("T")
META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        blocks: How many blocks the model has.
        layers: How many layers will be pruned.
        weights: How many weights these have.
        pruned: How many of them will be pruned, about (each comparison group rounds down).
        host_bytes: Peak of host memory.
        device_bytes: Peak of memory on the CUDA device.
        disk_bytes: What will be written: the output, gradient statistics, hidden states that find no room in memory.
        seconds: By stage, writing not included.
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
    """Say what `prune` with the same arguments would take; nothing is written and nothing changed.

    One block is read, calibrated with one batch and scored. Everything else is counted from there. For a folder or
    hub id, the run is one with an output.

    Args:
        model: As for `prune`.
        metric: As for `prune`.
        calibration: As for `prune`.
        settings: Every other argument of `prune`, by name.

    Raises:
        PruneForgeError: As `prune` does.
    """
    job = make_job(model, metric, calibration, **settings)
    peak = PeakMemory(job.device)
    loaded, data, (run,) = job.prepare(Group(), job.progress, on_disk=not isinstance(model, nn.Module))
    with (
        exact_arithmetic(run.seed, job.device),
        in_evaluation_mode(loaded.module),
        torch.no_grad(),
        one_line_for_full_devices(),
    ):
        seconds, waiting = _probe(job, loaded, data, run)
    measured = peak.read()
    on_device = job.device.type == "cuda"
    host_room, device_room = job.budgets.for_activations(run.blocks, run.metric, loaded, data.batches, job.device)
    waits_on_device = min(waiting, device_room)
    waits_on_host = min(waiting - waits_on_device, host_room)
    layers = [layer for block in run.blocks for layer in block.layers]
    weights = sum(layer.parameter.numel() for layer in layers)
    gradients = [kind for kind in run.metric.requires if issubclass(kind, GradientStatistic)]
    statistics = sum(made.total.nbytes for la in layers for made in empty_statistics(la, gradients, META).values())
    disk = waiting - waits_on_device - waits_on_host
    if loaded.checkpoint is not None:
        stored = stored_layers(loaded.module, run.blocks, loaded.checkpoint)
        disk += statistics + Rewrite(loaded.checkpoint, Path(), stored).bytes_needed()
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


def _probe(job: Job, loaded: LoadedModel, data: Calibration, run: Run) -> tuple[dict[str, float], int]:
    """Return seconds of each stage of the whole run, and how many bytes of hidden states will wait at a time."""
    residency: Residency
    if loaded.checkpoint is not None:
        residency = Streamed(loaded.module, run.blocks, job.device, loaded.checkpoint)
    else:
        residency = InMemory(loaded.module, run.blocks, job.device)
    timed = partial(_timed, device=job.device)
    chain = Chain(loaded.module, loaded.adapter, run.blocks, residency)
    block, blocks, batches = run.blocks[0], len(run.blocks), len(data.batches)
    seconds: dict[str, float] = {}
    captured: list[Activations] = []
    if data.batches:
        captured, taken = timed(lambda: chain.capture(data.batches[:1]))
        seconds["capture"] = taken * batches
    start = time.perf_counter()
    with residency.visit(block):
        reading = time.perf_counter() - start
        recorder = InputRecorder(block, [k for k in run.metric.requires if issubclass(k, InputStatistic)])

        def calibrate() -> torch.Tensor:
            with recorder.recording(captured[0].batch):
                return chain.run_block(0, captured[0].hidden, captured[0])

        gradients: dict[str, dict[Any, Any]] = {layer.name: {} for layer in block.layers}
        kinds = [kind for kind in run.metric.requires if issubclass(kind, GradientStatistic)]
        if captured:
            output, taken = timed(calibrate)
            _, plain = timed(lambda: chain.run_block(0, captured[0].hidden, captured[0]))
            seconds["calibrate"] = taken * batches * blocks
            seconds["propagate"] = plain * batches * (blocks - 1) if run.propagate == "pruned" else 0.0
            if kinds:
                taken = _probe_gradients(chain, captured[0], output, kinds, gradients)
                seconds["gradients"] = (plain + taken) * batches * blocks + 2 * reading * blocks

        def prune() -> None:
            shared: dict[int, dict[Any, Any]] = {}  # by input; made anew each time, since this is timed
            for layer in block.layers:
                statistics, of_input = recorder.statistics(layer)
                stats = LayerStatistics(statistics, shared.setdefault(id(of_input), {})).joined(gradients[layer.name])
                seed_random_numbers(run.seed, job.device)
                run.metric.prune_layer(layer, stats, run.pattern)

        seconds["prune"] = timed(prune)[1] * blocks
    seconds["read"] = reading * blocks
    if isinstance(residency, Streamed):
        residency.close()
    held = captured[0].hidden.nbytes * batches if captured else 0
    return seconds, held * (blocks + 2 if kinds else 2)


def _probe_gradients(
    chain: Chain, activations: Activations, output: torch.Tensor, kinds: list[Any], found: dict[str, dict[Any, Any]]
) -> float:
    """Fill `found` from one batch with a made-up gradient of the block's output, and return the seconds it took."""
    layers = chain.blocks[0].layers
    for layer in layers:
        found[layer.name] = empty_statistics(layer, kinds)

    def run() -> None:
        _, passes = block_gradients(chain, 0, activations.hidden, activations, torch.full_like(output, 1e-3))
        update(layers, found, passes, activations.batch.size, 1.0)

    return _timed(run, chain.residency.device)[1]


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return what some work gives and the seconds it takes; on a device, when done for the second time.

    The first time there also makes contexts, loads libraries and compiles kernels, which a run does once.
    """
    if device.type != "cpu":
        work()
    _wait_for(device)
    start = time.perf_counter()
    result = work()
    _wait_for(device)
    return result, time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
