"""Make and apply the masks of a block from its statistics.

The metric scores and the pattern selects (`interfaces/patterns.py`); over several layers a threshold does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pruneforge.engine.chain import Chain
from pruneforge.engine.processes import Group
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Pruned
from pruneforge.interfaces.patterns import Unstructured, pruned_count
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.interfaces.selection import Threshold, smallest
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.numerics import all_finite, seed_random_numbers

BlockStatistics = dict[str, LayerStatistics]
"""The statistics of the layers of one block, by layer name."""


class _Outcome(NamedTuple):
    """Result of one layer, sent to the other processes."""

    notes: Sequence[str]
    updated: bool


class Applier:
    """Prunes visited blocks for one or more runs."""

    def __init__(self, chain: Chain, group: Group, block_pruned: Callable[[Run, BlockResult], object]) -> None:
        self.chain = chain
        self.group = group
        self.block_pruned = block_pruned

    @torch.no_grad()
    def prune(self, run: Run, index: int, stats: BlockStatistics) -> None:
        """Prune the layers of a block, each in the process that owns it.

        Raises:
            PruneForgeError: A metric's mask does not fit the pattern, or its scores or weights are not finite.
        """
        block = self.chain.blocks[index]
        with run.profile.stage("prune", index):
            threshold = self._threshold(run, block, stats)
            if index < run.finished:
                # A finished block is not pruned again, but a threshold over the whole model counts the ties that it
                # prunes, block by block.
                if threshold is not None:
                    for layer in block.layers:
                        threshold.select(self.score(run, layer, stats[layer.name]))
                return
            masks, outcomes = self._masks(run, block, stats, threshold)
        notes = [f"{layer.name}: {note}" for layer in block.layers for note in outcomes[layer.name].notes]
        updated = frozenset(name for name, outcome in outcomes.items() if outcome.updated)
        pruned = {name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()}
        run.warnings += notes
        run.pruned.update(pruned)
        result = BlockResult(index, block, masks, pruned, notes, updated)
        run.output.add(result)
        self.block_pruned(run, result)

    @torch.no_grad()
    def find_threshold(self, run: Run, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> None:
        """Find a run's threshold over the scores of a whole model; `scores` is called once for each pass over them."""
        with run.profile.stage("prune"):
            run.threshold = _exact_threshold(run, layers, scores)

    def score(self, run: Run, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return a layer's scores [out, in]; equal at each call, since random numbers are seeded by layer."""
        return metric_score(run, layer, stats)

    def _threshold(self, run: Run, block: Block, stats: BlockStatistics) -> Threshold | None:
        """Return the threshold over several layers, or `None` for runs whose scope is within a layer."""
        if run.scope != "block":
            return run.threshold
        scores = [self.score(run, layer, stats[layer.name]) for layer in block.layers]
        return _exact_threshold(run, block.layers, lambda: scores)

    def _masks(
        self, run: Run, block: Block, stats: BlockStatistics, threshold: Threshold | None
    ) -> tuple[dict[str, Tensor], dict[str, _Outcome]]:
        """Prune a block's layers in place; return their masks on the CPU and the layers' outcomes, by name."""
        masks: dict[str, Tensor] = {}
        outcomes: dict[str, _Outcome] = {}
        # A threshold counts ties from layer to layer, so each process applies it to all layers; it is cheap.
        owners = self._owners(block, stats) if threshold is None else dict.fromkeys(stats, self.group.rank)
        error: Exception | None = None
        try:
            for layer in block.layers:
                if owners[layer.name] == self.group.rank:
                    pruned = self._prune_layer(run, layer, stats[layer.name], threshold)
                    layer.write(pruned.mask, pruned.weight)
                    masks[layer.name] = pruned.mask.cpu()
                    outcomes[layer.name] = _Outcome(pruned.notes, pruned.weight is not None)
        except Exception as raised:  # of any kind, since metrics are plugins; `agree` raises it in all processes
            error = raised
        outcomes = self.group.agree(error, outcomes)
        if threshold is None:
            masks = {layer.name: self._shared(layer, masks.get(layer.name), owners) for layer in block.layers}
        return masks, outcomes

    def _owners(self, block: Block, stats: BlockStatistics) -> dict[str, int]:
        """Return which process prunes each layer, by name.

        Layers of the same input go to one process, so that values derived from the input are computed once.
        """
        together: dict[int, list[Layer]] = {}
        for layer in block.layers:
            together.setdefault(stats[layer.name].input_key, []).append(layer)
        parts = list(together.values())
        # A layer costs its weights times its inputs, as in a solver that compensates column by column.
        owners = self.group.spread([sum(la.parameter.numel() * la.shape[1] for la in part) for part in parts])
        return {layer.name: owner for part, owner in zip(parts, owners, strict=True) for layer in part}

    def _shared(self, layer: Layer, mask: Tensor | None, owners: dict[str, int]) -> Tensor:
        """Send a layer that one process has pruned to all of them, and return its mask on the CPU."""
        if self.group.size > 1:
            device, owner = layer.parameter.device, owners[layer.name]
            # Contiguous, since a broadcast sends memory as it is, and a metric may return a transposed mask.
            empty = torch.empty(layer.shape, dtype=torch.uint8, device=device)
            sent = empty if mask is None else mask.to(device).contiguous().byte()
            self.group.send(sent, owner)
            self.group.send(layer.parameter.data, owner)
            mask = sent.bool().cpu()
        assert mask is not None
        return mask

    def _prune_layer(self, run: Run, layer: Layer, stats: LayerStatistics, threshold: Threshold | None) -> Pruned:
        """Return the metric's result for a layer, or the mask of a threshold over several layers."""
        pattern = run.pattern_for(layer)
        if threshold is not None:
            pruned = Pruned(threshold.select(self.score(run, layer, stats)))
        else:
            _reseed(run, layer)
            pruned = run.metric.prune_layer(layer, stats, pattern)
        _check(run, layer, pruned, f"metric {run.metric.name!r}")
        for refiner in run.refiners:
            _reseed(run, layer)
            refined = refiner.refine(layer, stats, pruned, pattern)
            _check(run, layer, refined, f"refiner {refiner.name!r}")
            pruned = replace(refined, notes=(*pruned.notes, *refined.notes))
        return pruned


def metric_score(run: Run, layer: Layer, stats: LayerStatistics) -> Tensor:
    """Return a layer's scores [out, in]; equal at each call, since random numbers are seeded by layer."""
    _reseed(run, layer)
    return run.metric.checked_score(layer, stats)


def _check(run: Run, layer: Layer, pruned: Pruned, who: str) -> None:
    """Raise unless a mask fits the layer's pattern and the weights are finite; `who` made them."""
    mask = pruned.mask
    if mask.dtype != torch.bool or mask.shape != layer.shape:
        raise PruneForgeError(
            f"{who} made a mask of {mask.dtype} {tuple(mask.shape)} for layer {layer.name!r}; "
            f"it must be boolean {layer.shape}"
        )
    # With comparison groups of its own, a method rounds the count in each of them, and the total may differ from the
    # layer's. N:M patterns leave no such freedom.
    own_groups = isinstance(run.pattern, Unstructured) and (run.metric.scope is None or run.scope in ("block", "model"))
    pattern = run.pattern_for(layer)
    if not own_groups and not pattern.fits(mask):
        raise PruneForgeError(f"{who} made a mask for layer {layer.name!r} that does not fit {pattern}")
    if pruned.weight is not None and not all_finite(pruned.weight):
        raise PruneForgeError(f"{who} made non-finite weights in layer {layer.name!r}")


def _exact_threshold(run: Run, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> Threshold:
    """Return the threshold that prunes exactly the pattern's share of the weights of several layers."""
    assert isinstance(run.pattern, Unstructured)
    if run.allocation is None:
        count = pruned_count(sum(layer.parameter.numel() for layer in layers), run.pattern.sparsity)
    else:
        count = sum(run.allocation[layer.name] for layer in layers)
    return smallest(scores, count) if count else Threshold(-torch.inf, 0)


def _reseed(run: Run, layer: Layer) -> None:
    """Seed random numbers by layer, so that they do not depend on the layers before it in this process."""
    seed_random_numbers(run.seed * 0x9E3779B1 + zlib.crc32(layer.name.encode()), layer.parameter.device)
