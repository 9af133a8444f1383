"""Time the stages of a run on one block, for estimates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from pruneforge.engine.chain import Chain
from pruneforge.engine.gradients import add_batch, block_gradients
from pruneforge.engine.hidden_states import BatchInFlight
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
    """Run one block with one batch; estimate the run's seconds by stage and its bytes of hidden states at a time.

    Nothing is written, and the block's pruned weights are not applied.
    """
    residency: Residency
    if loaded.checkpoint is not None:
        residency = Streamed(loaded.module, run.blocks, device, loaded.checkpoint)
    else:
        residency = InMemory(loaded.module, run.blocks, device)
    timed = partial(_timed, device=device)
    chain = Chain(loaded.module, loaded.adapter, run.blocks, residency)
    block, blocks, count = run.blocks[0], len(run.blocks), len(batches)
    seconds: dict[str, float] = {}
    captured: list[BatchInFlight] = []
    if batches:
        captured, taken = timed(lambda: chain.capture(batches[:1]))
        seconds["capture"] = taken * count
    start = time.perf_counter()
    with residency.visit(block):
        reading = time.perf_counter() - start
        recorder = InputRecorder(block, [k for k in run.requires if issubclass(k, InputStatistic)])

        def calibrate() -> torch.Tensor:
            with recorder.recording(captured[0].batch):
                return chain.run_block(0, captured[0].hidden, captured[0])

        gradients: dict[str, dict[Any, Any]] = {layer.name: {} for layer in block.layers}
        kinds = [kind for kind in run.requires if issubclass(kind, GradientStatistic)]
        if captured:
            output, taken = timed(calibrate)
            _, plain = timed(lambda: chain.run_block(0, captured[0].hidden, captured[0]))
            seconds["calibrate"] = taken * count * blocks
            if run.allocator is not None and run.allocator.requires:
                seconds["allocate"] = seconds["calibrate"]
            seconds["propagate"] = plain * count * (blocks - 1) if run.propagate == "pruned" else 0.0
            if kinds:
                taken = _probe_gradients(chain, captured[0], output, kinds, gradients)
                seconds["gradients"] = (plain + taken) * count * blocks + 2 * reading * blocks

        def prune() -> None:
            # By input. Empty at each call: on a device the second call is timed, and it must compute these values.
            shared: dict[int, dict[Any, Any]] = {}
            for layer in block.layers:
                statistics, of_input = recorder.statistics(layer)
                stats = LayerStatistics(statistics, shared.setdefault(id(of_input), {})).joined(gradients[layer.name])
                seed_random_numbers(run.seed, device)
                pruned = run.metric.prune_layer(layer, stats, run.pattern)
                for refiner in run.refiners:
                    pruned = refiner.refine(layer, stats, pruned, run.pattern)

        seconds["prune"] = timed(prune)[1] * blocks
    seconds["read"] = reading * blocks
    if isinstance(residency, Streamed):
        residency.close()
    # Gradients store the inputs of every block, the last outputs and their gradients.
    held = captured[0].hidden.nbytes * count if captured else 0
    return seconds, held * (blocks + 2 if kinds else 2)


def _probe_gradients(
    chain: Chain,
    in_flight: BatchInFlight,
    output: torch.Tensor,
    kinds: list[Any],
    statistics: dict[str, dict[Any, Any]],
) -> float:
    """Fill `statistics` from one batch with a constant gradient of the block's output; return the seconds taken."""
    layers = chain.blocks[0].layers
    for layer in layers:
        statistics[layer.name] = empty_statistics(layer, kinds)

    def run() -> None:
        _, gradients = block_gradients(chain, 0, in_flight.hidden, in_flight, torch.full_like(output, 1e-3))
        add_batch(layers, statistics, gradients, in_flight.batch.size, 1.0)

    return _timed(run, chain.residency.device)[1]


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return the result of `work` and the seconds it took, on a device the second time.

    There the first time also creates contexts, loads libraries and compiles kernels, which a run does once.
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
