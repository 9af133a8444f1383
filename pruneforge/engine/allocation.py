"""Give each layer its sparsity: measure the dense model, ask the allocator, and meet the budget exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruneforge.engine.gradient_store import GradientStore
from pruneforge.engine.guard import metric_score, named, seed_for, unchanged
from pruneforge.engine.hidden_states import BatchInFlight
from pruneforge.engine.masking import reached
from pruneforge.engine.stream import BlockStatistics, Flow, Streams
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.allocator import Allocator, measures_blocks
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.patterns import Pattern, pruned_count
from pruneforge.interfaces.run import Run, needed_to_allocate
from pruneforge.progress import Progress


@torch.no_grad()
def allocate(
    runs: Sequence[Run],
    captured: Mapping[str, Sequence[BatchInFlight]],
    flow: Flow,
    gradient_stores: Mapping[str, GradientStore],
    progress: Progress,
) -> None:
    """Set the allocation of each run that has an allocator and no allocation yet.

    Args:
        runs: The runs, which share one pass of the dense model for what their allocators measure.
        captured: Its captured batches by the data's name, at the first block's input; they stay there.
        flow: How they pass the dense model.
        gradient_stores: Hold the gradient statistics that the metrics require, by the data's name.
        progress: Shows progress.

    Raises:
        PruneForgeError: An allocator leaves out a layer, or returns something that is not a sparsity.
    """
    chain, group = flow.chain, flow.group
    waiting: list[tuple[Run, dict[str, Any]]] = [
        (run, {}) for run in runs if run.allocator is not None and run.allocation is None
    ]
    measured = [(run, measures) for run, measures in waiting if run.allocator and measures_blocks(run.allocator)]
    if measured:
        streams = Streams(captured, [each for run, _ in measured for each in needed_to_allocate(run)], flow)
        with flow.profile.stage("allocate"):
            for index, block in enumerate(progress.track(chain.blocks, "allocating sparsity")):
                with chain.residency.visit(block):
                    stats = streams.with_model_gradients(block, streams.calibrate(index), gradient_stores)
                    for run, measures in measured:
                        measures[block.name] = _measured(run, block, stats, chain.residency.device)
                streams.advance(index)
    sizes = sizes_of(chain.blocks)
    layers = [layer for block in chain.blocks for layer in block.layers]
    for run, measures in waiting:
        allocation: dict[str, int] = {}
        error: Exception | None = None
        try:
            if group.first:  # decides for all: what an allocator measures may differ in the last digit
                allocation = _allocation(run, measures, sizes, layers)
        except Exception as raised:  # `agree` raises it in all processes
            error = raised
        run.allocation = group.agree(error, allocation)
        run.output.allocated(run.allocation)


def _allocation(
    run: Run, measures: dict[str, Any], sizes: dict[str, dict[str, int]], layers: Sequence[Layer]
) -> dict[str, int]:
    """Ask a run's allocator, and return the steps of its pattern by which each layer is pruned."""
    allocator = run.allocator
    assert allocator is not None
    who = f"allocator {allocator.name!r}"
    seed_for(run.seed, "allocate", torch.device("cpu"))
    asked = named(who, "to allocate", lambda: allocator.allocate(measures, sizes, run.pattern.sparsity))
    return steps_of(asked, allocator, layers, run.pattern)


def sizes_of(blocks: Sequence[Block]) -> dict[str, dict[str, int]]:
    """Return the number of weights of each block's layers, by name."""
    return {block.name: {layer.name: layer.size for layer in block.layers} for block in blocks}


def steps_of(asked: object, allocator: Allocator, layers: Sequence[Layer], pattern: Pattern) -> dict[str, int]:
    """Return what an allocator asked for as steps of a pattern; see `within_budget`.

    Raises:
        PruneForgeError: It leaves out a layer, or returns something that is not a sparsity.
    """
    who = f"allocator {allocator.name!r}"
    if not isinstance(asked, Mapping):
        raise PruneForgeError(
            f"{who} returned {type(asked).__name__}; it must return a mapping of layers to sparsities"
        )
    _check(allocator.name, asked, layers)
    return within_budget(asked, layers, pattern)


def within_budget(asked: Mapping[str, float], layers: Sequence[Layer], pattern: Pattern) -> dict[str, int]:
    """Return how many steps of a pattern each layer is pruned by, so that together they meet its sparsity.

    They fall short of it by less than the smallest step of a layer that has one left: by none if a step is a weight.

    A step is the fewest weights that the pattern prunes of a layer at a time: one, one of each row, or one of each
    group. The sparsities asked for are shifted by the same amount until their sum is right, and rounded down; what is
    left over goes to the layers with the largest remainders.

    Args:
        asked: Sparsity of each layer, by name.
        layers: The layers.
        pattern: The run's pattern.
    """
    steps = {layer.name: pattern.steps(layer.shape) for layer in layers}  # most of them, and weights in each
    sizes = {layer.name: layer.size for layer in layers}
    budget = pruned_count(sum(sizes.values()), pattern.sparsity)

    def wanted(shift: float) -> dict[str, float]:
        return {
            name: min(max(asked[name] + shift, 0.0), most * each / sizes[name]) for name, (most, each) in steps.items()
        }

    low, high = -1.0, 1.0
    for _ in range(60):  # halves the interval to less than a float's resolution
        middle = (low + high) / 2
        pruned = sum(sizes[name] * share for name, share in wanted(middle).items())
        low, high = (middle, high) if pruned < budget else (low, middle)
    exact = {name: share * sizes[name] / steps[name][1] for name, share in wanted(high).items()}
    whole = {name: int(value + 1e-9) for name, value in exact.items()}
    left = budget - sum(whole[name] * each for name, (_, each) in steps.items())
    order = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    # Again while a step fits: where steps differ in size, only layers that had one already may be small enough.
    while fitting := [name for name in order if steps[name][1] <= left and whole[name] < steps[name][0]]:
        for name in fitting:
            if steps[name][1] <= left:
                whole[name] += 1
                left -= steps[name][1]
    return whole


def _check(allocator: str, asked: Mapping[str, float], layers: Sequence[Layer]) -> None:
    """Raise unless an allocator gives every layer a sparsity."""
    for layer in layers:
        share = asked.get(layer.name)
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise PruneForgeError(
                f"allocator {allocator!r} gives layer {layer.name!r} the sparsity {share!r}; it must be from 0 to 1"
            )


def _measured(run: Run, block: Block, stats: BlockStatistics, device: torch.device) -> dict[str, Any]:
    """Return what a run's allocator measures of a block.

    Raises:
        PruneForgeError: It fails, changes what it is given, or returns what JSON cannot hold.
    """
    allocator = run.allocator
    assert allocator is not None
    who = f"allocator {allocator.name!r}"
    seed_for(run.seed, block.name, device)
    known = tuple(reached(block.layers, stats, needed_to_allocate(run)))
    block = replace(block, layers=known)
    own = {layer.name: stats[layer.name].owned_by(allocator) for layer in known}
    score = partial(_score, run, stats)
    with unchanged(who, [(layer, own[layer.name]) for layer in block.layers]):
        measured = named(who, f"on block {block.name!r}", lambda: allocator.measure(block, own, score))
    try:
        json.dumps(measured)
    except (TypeError, ValueError) as error:
        raise PruneForgeError(f"{who} measured of block {block.name!r} what JSON cannot hold: {error}") from error
    return measured


def _score(run: Run, stats: BlockStatistics, layer: Layer) -> Tensor:
    return metric_score(run, layer, stats[layer.name])
