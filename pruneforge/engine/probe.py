"""A short probe of one block: what its stages take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from pruneforge.engine.chain import Activations, Chain
from pruneforge.engine.gradients import block_gradients, update
from pruneforge.engine.recorder import InputRecorder
from pruneforge.engine.residency import InMemory, Residency, Streamed
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import GradientStatistic, InputStatistic, LayerStatistics, empty_statistics
from pruneforge.numerics import seed_random_numbers

T = TypeVar("T")


def probe(
    loaded: LoadedModel, batches: Sequence[Batch], run: Run, device: torch.device
) -> tuple[dict[str, float], int]:
    """Return seconds of each stage of the whole run, and how many bytes of hidden states will wait at a time."""
    residency: Residency
    if loaded.checkpoint is not None:
        residency = Streamed(loaded.module, run.blocks, device, loaded.checkpoint)
    else:
        residency = InMemory(loaded.module, run.blocks, device)
    timed = partial(_timed, device=device)
    chain = Chain(loaded.module, loaded.adapter, run.blocks, residency)
    block, blocks, count = run.blocks[0], len(run.blocks), len(batches)
    seconds: dict[str, float] = {}
    captured: list[Activations] = []
    if batches:
        captured, taken = timed(lambda: chain.capture(batches[:1]))
        seconds["capture"] = taken * count
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
            seconds["calibrate"] = taken * count * blocks
            seconds["propagate"] = plain * count * (blocks - 1) if run.propagate == "pruned" else 0.0
            if kinds:
                taken = _probe_gradients(chain, captured[0], output, kinds, gradients)
                seconds["gradients"] = (plain + taken) * count * blocks + 2 * reading * blocks

        def prune() -> None:
            shared: dict[int, dict[Any, Any]] = {}  # by input; made anew each time, since this is timed
            for layer in block.layers:
                statistics, of_input = recorder.statistics(layer)
                stats = LayerStatistics(statistics, shared.setdefault(id(of_input), {})).joined(gradients[layer.name])
                seed_random_numbers(run.seed, device)
                run.metric.prune_layer(layer, stats, run.pattern)

        seconds["prune"] = timed(prune)[1] * blocks
    seconds["read"] = reading * blocks
    if isinstance(residency, Streamed):
        residency.close()
    held = captured[0].hidden.nbytes * count if captured else 0
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
