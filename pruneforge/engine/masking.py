"""Making and applying the masks of a block, once its statistics are there."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
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
"""What was collected for the layers of one block, by layer name."""


class _Noted(NamedTuple):
    """What a process tells the others of a layer that it pruned."""

    notes: Sequence[str]
    updated: bool


class Applier:
    """Prunes visited blocks for one or several runs."""

    def __init__(self, chain: Chain, group: Group, block_pruned: Callable[[Run, BlockResult], object]) -> None:
        self.chain = chain
        self.group = group
        self.block_pruned = block_pruned

    @torch.no_grad()
    def prune(self, run: Run, index: int, stats: BlockStatistics) -> None:
        """Make and apply the masks of a block's layers, each in the process that it falls to."""
        block = self.chain.blocks[index]
        with run.profile.stage("prune", index):
            threshold = self._threshold(run, block, stats)
            if index < run.finished:
                if threshold is not None:  # it counts ties as it goes
                    for layer in block.layers:
                        threshold.select(self.score(run, layer, stats[layer.name]))
                return
            masks, noted = self._masks(run, block, stats, threshold)
        notes = [f"{layer.name}: {note}" for layer in block.layers for note in noted[layer.name].notes]
        updated = frozenset(name for name, found in noted.items() if found.updated)
        pruned = {name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()}
        run.warnings += notes
        run.pruned.update(pruned)
        result = BlockResult(index, block, masks, pruned, notes, updated)
        run.output.add(result)
        self.block_pruned(run, result)

    @torch.no_grad()
    def find_threshold(self, run: Run, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> None:
        """Find a run's threshold over the scores of a whole model; `scores` yields them, in several passes."""
        with run.profile.stage("prune"):
            run.threshold = _exact_threshold(run, layers, scores)

    def score(self, run: Run, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return a layer's scores [out, in], the same each time."""
        _reseed(run, layer)
        return run.metric.checked_score(layer, stats)

    def _threshold(self, run: Run, block: Block, stats: BlockStatistics) -> Threshold | None:
        """Return the threshold over several layers that a run's scope asks for."""
        if run.scope != "block":
            return run.threshold
        scores = [self.score(run, layer, stats[layer.name]) for layer in block.layers]
        return _exact_threshold(run, block.layers, lambda: scores)

    def _masks(
        self, run: Run, block: Block, stats: BlockStatistics, threshold: Threshold | None
    ) -> tuple[dict[str, Tensor], dict[str, _Noted]]:
        """Prune a block's layers in place and return their masks on the CPU, and what is to be said of them."""
        masks: dict[str, Tensor] = {}
        noted: dict[str, _Noted] = {}
        # A threshold over several layers is applied in their order, and cheaply: by every process for itself.
        owners = self._owners(block, stats) if threshold is None else dict.fromkeys(stats, self.group.rank)
        error: Exception | None = None
        try:
            for layer in block.layers:
                if owners[layer.name] == self.group.rank:
                    pruned = self._prune_layer(run, layer, stats[layer.name], threshold)
                    _check(run, layer, pruned)
                    layer.write(pruned.mask, pruned.weight)
                    masks[layer.name] = pruned.mask.cpu()
                    noted[layer.name] = _Noted(pruned.notes, pruned.weight is not None)
        except Exception as raised:  # whatever a metric raises, or a device that is full
            error = raised
        noted = self.group.agree(error, noted)
        if threshold is None:
            masks = {layer.name: self._shared(layer, masks.get(layer.name), owners) for layer in block.layers}
        return masks, noted

    def _owners(self, block: Block, stats: BlockStatistics) -> dict[str, int]:
        """Return which process prunes each layer; those that share an input stay together, to share what is derived."""
        together: dict[int, list[Layer]] = {}
        for layer in block.layers:
            together.setdefault(stats[layer.name].input_key, []).append(layer)
        parts = list(together.values())
        owners = self.group.spread([sum(la.parameter.numel() * la.shape[1] for la in part) for part in parts])
        return {layer.name: owner for part, owner in zip(parts, owners, strict=True) for layer in part}

    def _shared(self, layer: Layer, mask: Tensor | None, owners: dict[str, int]) -> Tensor:
        """Bring a layer that one process has pruned to all of them, and return its mask."""
        if self.group.size > 1:
            device, owner = layer.parameter.device, owners[layer.name]
            empty = torch.empty(layer.shape, dtype=torch.uint8, device=device)
            sent = empty if mask is None else mask.to(device).contiguous().byte()
            self.group.send(sent, owner)
            self.group.send(layer.parameter.data, owner)
            mask = sent.bool().cpu()
        assert mask is not None
        return mask

    def _prune_layer(self, run: Run, layer: Layer, stats: LayerStatistics, threshold: Threshold | None) -> Pruned:
        """Ask the metric for a layer's mask, or select it by a threshold over several layers."""
        if threshold is not None:
            return Pruned(threshold.select(self.score(run, layer, stats)))
        _reseed(run, layer)
        return run.metric.prune_layer(layer, stats, run.pattern)


def _check(run: Run, layer: Layer, pruned: Pruned) -> None:
    """Raise unless a metric's mask fits the pattern, and its weights are finite."""
    mask = pruned.mask
    if mask.dtype != torch.bool or mask.shape != layer.shape:
        raise PruneForgeError(
            f"metric {run.metric.name!r} made a mask of {mask.dtype} {tuple(mask.shape)} for layer {layer.name!r}; "
            f"it must be boolean {layer.shape}"
        )
    # A method with its own comparison groups rounds in each of them; N:M binds it all the same.
    own_groups = isinstance(run.pattern, Unstructured) and (run.metric.scope is None or run.scope in ("block", "model"))
    if not own_groups and not run.pattern.fits(mask):
        raise PruneForgeError(
            f"metric {run.metric.name!r} made a mask for layer {layer.name!r} that does not fit {run.pattern}"
        )
    if pruned.weight is not None and not all_finite(pruned.weight):
        raise PruneForgeError(f"metric {run.metric.name!r} made non-finite weights in layer {layer.name!r}")


def _exact_threshold(run: Run, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> Threshold:
    """Return the threshold that prunes exactly as many weights of several layers as a run's pattern says."""
    assert isinstance(run.pattern, Unstructured)
    count = pruned_count(sum(layer.parameter.numel() for layer in layers), run.pattern.sparsity)
    return smallest(scores, count) if count else Threshold(-torch.inf, 0)


def _reseed(run: Run, layer: Layer) -> None:
    """Give each layer random numbers of its own, whichever layers came before it in this process."""
    seed_random_numbers(run.seed * 0x9E3779B1 + zlib.crc32(layer.name.encode()), layer.parameter.device)
