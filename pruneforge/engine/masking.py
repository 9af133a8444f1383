"""Make and apply the masks of a block from its statistics.

The metric scores and the pattern selects (`interfaces/patterns.py`); over several layers a threshold does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pruneforge.engine.chain import Chain
from pruneforge.engine.details import LayerDetails
from pruneforge.engine.guard import (
    check_pruned,
    check_share,
    guarded,
    metric_score,
    named,
    score_measures,
    seed_for,
    unchanged,
)
from pruneforge.engine.processes import Group
from pruneforge.engine.recovery import PrunedBlock
from pruneforge.engine.stream import BlockStatistics, Stream
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Pruned, prunes_blocks
from pruneforge.interfaces.patterns import Unstructured, pruned_count
from pruneforge.interfaces.recovery import recovers_blocks
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.interfaces.selection import Threshold, smallest
from pruneforge.interfaces.statistics import LayerStatistics, Requirement
from pruneforge.numerics import accumulation_dtype


class _Outcome(NamedTuple):
    """Result of one layer, sent to the other processes."""

    notes: Sequence[str]
    updated: bool
    permutation: Tensor | None  # on the CPU
    measured: dict[str, float]  # of its scores


class Applier:
    """Prunes visited blocks for one or more runs."""

    def __init__(self, chain: Chain, group: Group, block_pruned: Callable[[Run, BlockResult], object]) -> None:
        self.chain = chain
        self.group = group
        self.block_pruned = block_pruned

    @torch.no_grad()
    def prune(self, run: Run, index: int, stats: BlockStatistics, stream: Stream | None) -> None:
        """Prune the layers of a block, each in the process that owns it, and recover what remains.

        Args:
            run: The run.
            index: The block.
            stats: Its statistics.
            stream: The batches that recovery learns from.

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
                    for layer in reached(block.layers, stats, run.requires):
                        threshold.select(metric_score(run, layer, stats[layer.name]))
                return
            details = LayerDetails(run, block, stats) if run.wants_details and self.group.first else None
            dense = _copies(block.layers) if recovers_blocks(run.recovery) else {}
            masks, outcomes = self._masks(run, block, stats, threshold)
        pruning = reached(block.layers, stats, run.requires)
        notes = [f"{layer.name}: {note}" for layer in pruning for note in outcomes[layer.name].notes]
        updated = frozenset(name for name, outcome in outcomes.items() if outcome.updated)
        if recovers_blocks(run.recovery) and block.layers:
            with run.profile.stage("recover", index):
                owners = {name: owner for name, owner in self._owners(block, stats).items() if name in outcomes}
                site = PrunedBlock(run, self.chain, index, stats, masks, dense, owners, stream, self.group)
                updated |= site.recover()
        pruned = {name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()}
        notes += [
            f"{layer.name}: all of its weights are pruned" for layer in pruning if pruned[layer.name] == layer.size
        ]
        if len(pruning) < len(block.layers):
            left = [layer.name for layer in block.layers if layer.name not in outcomes]
            notes.append(f"no calibration token reached {len(left)} layers, which stay dense: {', '.join(left)}")
        run.warnings += notes
        run.pruned.update(pruned)
        run.updated |= updated
        if run.scope == "block":
            check_count(run, pruning, sum(pruned.values()), f"block {block.name!r}")
        measured = details.measured() if details is not None else {}
        for name, outcome in outcomes.items():
            if outcome.measured:
                measured.setdefault(name, {})["measured"] = outcome.measured
        run.details.update(measured)
        permutations = _permutations(block.layers, outcomes) if run.metric.permutes else {}
        result = BlockResult(index, block, masks, pruned, notes, updated, measured, permutations)
        run.output.add(result)
        self.block_pruned(run, result)

    @torch.no_grad()
    def find_threshold(self, run: Run, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> None:
        """Find a run's threshold over the scores of a whole model; `scores` is called once for each pass over them."""
        with run.profile.stage("prune"):
            run.threshold = _exact_threshold(run, layers, scores)

    def _threshold(self, run: Run, block: Block, stats: BlockStatistics) -> Threshold | None:
        """Return the threshold over several layers, or `None` for runs whose scope is within a layer."""
        if run.scope != "block":
            return run.threshold
        layers = reached(block.layers, stats, run.requires)
        scores = [metric_score(run, layer, stats[layer.name]) for layer in layers]
        return _exact_threshold(run, layers, lambda: scores)

    def _masks(
        self, run: Run, block: Block, stats: BlockStatistics, threshold: Threshold | None
    ) -> tuple[dict[str, Tensor], dict[str, _Outcome]]:
        """Prune a block's layers in place; return their masks on the CPU and the layers' outcomes, by name."""
        masks: dict[str, Tensor] = {}
        outcomes: dict[str, _Outcome] = {}
        # A threshold counts ties from layer to layer, so each process applies it to all layers; it is cheap.
        owners = self._owners(block, stats) if threshold is None else dict.fromkeys(stats, self.group.rank)
        pruning = reached(block.layers, stats, run.requires)
        error: Exception | None = None
        together: dict[str, Pruned] = {}
        try:
            if pruning and threshold is None and prunes_blocks(run.metric):
                owners = dict.fromkeys(stats, 0)
                if self.group.first:
                    together = _prune_together(run, pruning, block, stats)
            for layer in pruning:
                if owners[layer.name] == self.group.rank:
                    given = together.get(layer.name)
                    of_scores = score_measures(run, layer, stats[layer.name])
                    pruned = self._prune_layer(run, layer, stats[layer.name], threshold, given)
                    masks[layer.name] = pruned.mask.cpu()
                    if layer.name not in together:
                        check_share(run, [layer], masks, f"layer {layer.name!r}")
                    layer.write(pruned.mask, pruned.weight)
                    order = None if pruned.permutation is None else pruned.permutation.cpu()
                    outcomes[layer.name] = _Outcome(pruned.notes, pruned.weight is not None, order, of_scores)
            if together:
                check_share(run, pruning, masks, f"block {block.name!r}")
        except Exception as raised:  # of any kind, since metrics are plugins; `agree` raises it in all processes
            error = raised
        outcomes = self.group.agree(error, outcomes)
        if threshold is None:
            masks = {layer.name: self._shared(layer, masks.get(layer.name), owners) for layer in pruning}
        masks |= {la.name: torch.ones(la.shape, dtype=torch.bool) for la in block.layers if la.name not in masks}
        return {layer.name: masks[layer.name] for layer in block.layers}, outcomes

    def _owners(self, block: Block, stats: BlockStatistics) -> dict[str, int]:
        """Return which process prunes each layer, by name.

        Layers of the same input go to one process, so that values derived from the input are computed once.
        """
        together: dict[int, list[Layer]] = {}
        for layer in block.layers:
            together.setdefault(stats[layer.name].input_key, []).append(layer)
        parts = list(together.values())
        # A layer costs its weights times its inputs, as in a solver that compensates column by column.
        owners = self.group.spread([sum(la.size * la.shape[1] for la in part) for part in parts])
        return {layer.name: owner for part, owner in zip(parts, owners, strict=True) for layer in part}

    def _shared(self, layer: Layer, mask: Tensor | None, owners: dict[str, int]) -> Tensor:
        """Send a layer that one process has pruned to all of them, and return its mask on the CPU."""
        if self.group.size > 1:
            device, owner = layer.parameter.device, owners[layer.name]
            # Contiguous, since a broadcast sends memory as it is, and a metric may return a transposed mask.
            empty = torch.empty(layer.shape, dtype=torch.uint8, device=device)
            sent = empty if mask is None else mask.to(device).contiguous().byte()
            self.group.send(sent, owner)
            self.group.send_weight(layer, owner)
            mask = sent.bool().cpu()
        assert mask is not None
        return mask

    def _prune_layer(
        self, run: Run, layer: Layer, stats: LayerStatistics, threshold: Threshold | None, given: Pruned | None
    ) -> Pruned:
        """Return the metric's result for a layer, or the mask of a threshold over several layers, refined.

        Args:
            run: The run.
            layer: The layer, dense.
            stats: Its statistics.
            threshold: A threshold over the scores of several layers.
            given: The result of a metric that has decided over the whole block.
        """
        pattern, who = run.pattern_for(layer), f"metric {run.metric.name!r}"
        # With comparison groups over layers, or of its own, a method rounds the count elsewhere; N:M leaves no freedom.
        other_groups = threshold is not None or (run.metric.scope is None and isinstance(pattern, Unstructured))
        if threshold is not None:
            pruned = Pruned(threshold.select(metric_score(run, layer, stats)))
        else:
            own = stats.owned_by(run.metric)
            if given is None:
                given = guarded(run, layer, own, who, lambda: run.metric.prune_layer(layer, own, pattern))
            pruned = given
            check_pruned(layer, pruned, None if other_groups else pattern, who, run.metric.permutes)
        if other_groups and run.refiners:  # they have to keep what this layer lost
            count = pruned.mask.numel() - int(pruned.mask.count_nonzero())
            pattern = Unstructured(0.0, "layer").at(count, layer.shape)
        for part, refiner in enumerate(run.refiners, 1):
            who, own = f"refiner {refiner.name!r}", stats.owned_by(refiner)
            if refiner.masks_only and pruned.weight is not None:
                note = "the metric updates weights, so its mask was not refined"
                pruned = replace(pruned, notes=(*pruned.notes, note))
                continue
            refined = guarded(run, layer, own, who, partial(refiner.refine, layer, own, pruned, pattern), part)
            check_pruned(layer, refined, pattern, who)
            pruned = replace(refined, notes=(*pruned.notes, *refined.notes))
        return pruned


def _copies(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return copies of weights [out, in] in float32 or better, by layer name."""
    return {la.name: la.matrix().to(accumulation_dtype(la.parameter.dtype), copy=True) for la in layers}


def _permutations(layers: Sequence[Layer], outcomes: Mapping[str, _Outcome]) -> dict[str, Tensor]:
    """Return the order of the columns of each layer, by name; a layer that was left dense has its own."""
    made = {name: outcome.permutation for name, outcome in outcomes.items() if outcome.permutation is not None}
    return {layer.name: made.get(layer.name, torch.arange(layer.shape[1])) for layer in layers}


def _prune_together(run: Run, layers: Sequence[Layer], block: Block, stats: BlockStatistics) -> dict[str, Pruned]:
    """Return what a metric that decides over whole blocks makes of the layers of a block that data reached.

    Raises:
        PruneForgeError: It fails, leaves a layer out, or changes what it is given.
    """
    who = f"metric {run.metric.name!r}"
    own = {layer.name: stats[layer.name].owned_by(run.metric) for layer in layers}
    patterns = {layer.name: run.pattern_for(layer) for layer in layers}
    seed_for(run.seed, block.name, layers[0].parameter.device)
    with unchanged(who, [(layer, own[layer.name]) for layer in layers]):
        made = named(who, f"on block {block.name!r}", lambda: run.metric.prune_block(layers, own, patterns))
    for layer in layers:
        if not isinstance(made, dict) or not isinstance(made.get(layer.name), Pruned):
            raise PruneForgeError(f"{who} made nothing of layer {layer.name!r}; `prune_block` must return each layer")
    return made


def reached(layers: Iterable[Layer], stats: BlockStatistics, requires: Iterable[Requirement]) -> list[Layer]:
    """Return the layers without those routed ones of which no calibration token came into a required statistic.

    A method knows nothing of those: their scores would all be equal, and the order of the weights would decide.
    """
    return [layer for layer in layers if not layer.routed or all(stats[layer.name][kind].tokens for kind in requires)]


def check_count(run: Run, layers: Sequence[Layer], pruned: int, of: str) -> None:
    """Raise unless layers that are compared together have lost exactly the weights asked for.

    Raises:
        PruneForgeError: They have not; `of` says whose weights they are.
    """
    asked = _count(run, layers)
    if pruned != asked:
        raise PruneForgeError(f"{pruned} weights of {of} are pruned, where {asked} were asked for")


def _count(run: Run, layers: Sequence[Layer]) -> int:
    """Return how many weights of several layers, compared together, a run prunes."""
    assert isinstance(run.pattern, Unstructured)
    if run.allocation is not None:
        return sum(run.allocation[layer.name] for layer in layers)
    return pruned_count(sum(layer.size for layer in layers), run.pattern.sparsity)


def _exact_threshold(run: Run, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> Threshold:
    """Return the threshold that prunes exactly the pattern's share of the weights of several layers."""
    count = _count(run, layers)
    return smallest(scores, count) if count else Threshold(-torch.inf, 0)
