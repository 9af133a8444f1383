"""Time the stages of a run on one block, for estimates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from pruneforge.engine.backward import add_batch, block_gradients
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import BlockGradients, InMemoryGradientStore, Kind
from pruneforge.engine.hidden_states import BatchInFlight
from pruneforge.engine.masking import reached
from pruneforge.engine.processes import Group
from pruneforge.engine.recovery import PrunedBlock
from pruneforge.engine.residency import InMemory, Residency, Streamed
from pruneforge.engine.stream import BlockStatistics, Flow, Streams
from pruneforge.interfaces.adapter import Block, LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.recovery import recovers_blocks
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import LayerStatistics, empty_statistics
from pruneforge.numerics import seed_random_numbers
from pruneforge.profile import Profile

T = TypeVar("T")


def probe(
    loaded: LoadedModel, batches: Sequence[Batch], runs: Sequence[Run], device: torch.device
) -> tuple[dict[str, float], int]:
    """Run one block with one batch; estimate a pass's seconds by stage and its bytes of hidden states at a time.

    Nothing is written, and the block's pruned weights are not applied.

    Args:
        loaded: The model.
        batches: Calibration data; the first of them is run.
        runs: The runs of the pass, which share all but what becomes of each block.
        device: Where to compute.
    """
    run = runs[0]
    requires = tuple(dict.fromkeys(required for each in runs for required in each.requires))
    residency: Residency
    if loaded.checkpoint is not None:
        residency = Streamed(loaded.module, run.blocks, device, loaded.checkpoint)
    else:
        residency = InMemory(loaded.module, run.blocks, device)
    timed = partial(_timed, device=device)
    chain = Chain(loaded.module, loaded.adapter, run.blocks, residency, objective=run.objective)
    block, blocks, count = run.blocks[0], len(run.blocks), len(batches)
    seconds: dict[str, float] = {}
    captured: list[BatchInFlight] = []
    if batches:
        captured, taken = timed(lambda: chain.capture(batches[:1]))
        seconds["capture"] = taken * count
    names = ["", *dict.fromkeys(name for each in runs for name in each.streams)] if captured else []
    targets = run.recovery.targets if run.recovery is not None else None
    flow = Flow(chain, Group(), Profile(), dense=True, targets=targets)
    kinds = Streams(dict.fromkeys(names, captured), requires, flow).model_gradients()
    start = time.perf_counter()
    with residency.visit(block):
        reading = time.perf_counter() - start

        def calibrate() -> tuple[Streams, BlockStatistics]:
            streams = Streams(dict.fromkeys(names, captured), requires, flow)
            return streams, streams.calibrate(0)

        (streams, stats), taken = timed(calibrate)
        if captured:
            output, plain = timed(lambda: chain.run_block(0, captured[0].hidden, captured[0]))
            seconds["calibrate"] = taken * count * blocks
            if run.allocator is not None and run.allocator.requires:
                seconds["allocate"] = seconds["calibrate"]
            seconds["propagate"] = plain * count * (blocks - 1) if run.propagate == "pruned" else 0.0
            if kinds:
                taken, store = _probe_gradients(chain, captured[0], output, kinds)
                seconds["gradients"] = (plain + taken) * count * blocks + 2 * reading * blocks
                stats = streams.with_model_gradients(block, stats, dict.fromkeys(kinds, store))
        # Several runs begin with the same weights, of which a copy is kept.
        kept = [layer.weight.clone() for layer in block.layers] if len(runs) > 1 else []
        seconds["prune"] = timed(lambda: _prune(runs, block, stats, device))[1] * blocks
        del kept
        if recovers_blocks(run.recovery):
            dense = {layer.name: layer.weight.clone() for layer in block.layers}
            masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
            owners = {layer.name: 0 for layer in reached(block.layers, stats, run.requires)}
            site = PrunedBlock(run, chain, 0, stats, masks, dense, owners, streams.main, Group())
            before = [parameter.detach().clone() for parameter in block.module.parameters()]
            seconds["recover"] = timed(site.recover)[1] * blocks * (count if targets else 1) * len(runs)
            for parameter, value in zip(block.module.parameters(), before, strict=True):
                parameter.data.copy_(value)
    seconds["read"] = reading * blocks
    if isinstance(residency, Streamed):
        residency.close()
    # Gradients store the inputs of every block, the last outputs and their gradients.
    held = captured[0].hidden.nbytes * count if captured else 0
    return seconds, held * (blocks + 2 if kinds else 2)


def _prune(runs: Sequence[Run], block: Block, stats: BlockStatistics, device: torch.device) -> None:
    """Make the masks of a block for each run, and drop them."""
    # By input. Empty at each call: on a device the second call is timed, and it must compute the shared values.
    shared: dict[int, dict[Any, Any]] = {}
    for run in runs:
        layers = reached(block.layers, stats, run.requires)
        fresh = {
            layer.name: LayerStatistics(
                dict(stats[layer.name].items()), shared.setdefault(stats[layer.name].input_key, {})
            )
            for layer in layers
        }
        own = {name: of_layer.owned_by(run.metric) for name, of_layer in fresh.items()}
        seed_random_numbers(run.seed, device)
        pruned = run.metric.prune_block(layers, own, dict.fromkeys(own, run.pattern))
        for layer in layers:
            for refiner in run.refiners:
                if refiner.masks_only and pruned[layer.name].weight is not None:
                    continue
                of_layer = fresh[layer.name].owned_by(refiner)
                pruned[layer.name] = refiner.refine(layer, of_layer, pruned[layer.name], run.pattern)


def _probe_gradients(
    chain: Chain, in_flight: BatchInFlight, output: torch.Tensor, kinds: Mapping[str, Sequence[Kind]]
) -> tuple[float, InMemoryGradientStore]:
    """Collect statistics of one batch with a constant gradient of the block's output; return the seconds taken."""
    block, store = chain.blocks[0], InMemoryGradientStore()
    wanted = list(dict.fromkeys(kind for of_stream in kinds.values() for kind in of_stream))
    statistics: BlockGradients = {layer.name: empty_statistics(layer, wanted) for layer in block.layers}

    def run() -> None:
        _, gradients = block_gradients(chain, 0, in_flight.hidden, in_flight, torch.full_like(output, 1e-3))
        add_batch(block.layers, statistics, gradients, in_flight.batch.size, 1.0)

    taken = _timed(run, chain.residency.device)[1] * len(kinds)
    store.put(block, statistics)
    return taken, store


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
