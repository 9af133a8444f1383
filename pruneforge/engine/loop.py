"""The loop: for each block, calibrate, score, select, apply, propagate.

There is one loop for all metrics and architectures. What differs comes in through three interfaces: the
adapter's blocks, the statistics a metric requires, and the residency that brings blocks in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pruneforge.adapter import Block
from pruneforge.batch import Batch
from pruneforge.engine.calibrate import InputRecorder
from pruneforge.engine.chain import Activations, Chain
from pruneforge.engine.gradients import LayerGradients, gradient_statistics
from pruneforge.engine.run import BlockResult, Run
from pruneforge.errors import PruneForgeError
from pruneforge.layer import Layer
from pruneforge.metric import Pruned
from pruneforge.patterns import Unstructured, pruned_count
from pruneforge.progress import Progress
from pruneforge.selection import Threshold, smallest
from pruneforge.statistics import GradientStatistic, InputStatistic, LayerStatistics

BlockStatistics = dict[str, LayerStatistics]
"""What was collected for the layers of one block, by layer name."""


def prune_blocks(
    run: Run,
    chain: Chain,
    batches: Sequence[Batch],
    progress: Progress,
    block_pruned: Callable[[BlockResult], object],
) -> None:
    """Prune every block of a model in place; `run.masks` then holds the masks.

    Args:
        run: What to do; its masks, times and warnings are filled in.
        chain: The model.
        batches: Calibration data; unused if the metric requires no statistic.
        progress: Where to show how far along the run is.
        block_pruned: Called after each block.

    Raises:
        PruneForgeError: A layer does not fit the pattern, weights or activations are not finite, or the
            metric cannot work in the scope asked for. Layers before the one named are already pruned.
    """
    _check(run, chain)
    loop = _Loop(run, chain, batches, progress)
    group = getattr(run.pattern, "scope", None)
    results = loop.with_model_scope() if group == "model" else loop.block_by_block(within_block=group == "block")
    for result in progress.track(results, "pruning blocks", len(chain.blocks)):
        block_pruned(result)


def _check(run: Run, chain: Chain) -> None:
    owners: dict[int, str] = {}
    for block in chain.blocks:
        for layer in block.layers:
            run.pattern.check(layer.name, layer.shape[1])
            other = owners.setdefault(id(layer.parameter), layer.name)
            if other != layer.name:
                raise PruneForgeError(
                    f"layers {other!r} and {layer.name!r} share one weight, which would be pruned twice; "
                    "untie them before pruning"
                )
    layers = {id(layer.parameter) for block in chain.blocks for layer in block.layers}
    for name, parameter in chain.module.named_parameters(remove_duplicate=False):
        if id(parameter) in layers and name != owners[id(parameter)] + ".weight":
            raise PruneForgeError(f"{name!r} shares the weight of layer {owners[id(parameter)]!r}; untie them first")


class _Loop:
    def __init__(self, run: Run, chain: Chain, batches: Sequence[Batch], progress: Progress) -> None:
        self.run = run
        self.chain = chain
        requires = run.metric.requires
        self.input_kinds = [kind for kind in requires if issubclass(kind, InputStatistic)]
        self.gradients: LayerGradients = {}
        self.activations: list[Activations] = []
        if not requires:
            return
        with run.timed("capture"):
            self.activations = chain.capture(batches)
        gradient_kinds = [kind for kind in requires if issubclass(kind, GradientStatistic)]
        if gradient_kinds:
            with run.timed("gradients"):
                self.gradients = gradient_statistics(chain, self.activations, gradient_kinds, progress)
        if not self.input_kinds:
            self.activations = []

    def block_by_block(self, within_block: bool) -> Iterator[BlockResult]:
        """Prune each block before the next is calibrated."""
        for index, block in enumerate(self.chain.blocks):
            with self.chain.residency.visit(block):
                stats = self.calibrate(index)
                threshold = self.threshold([(block, stats)]) if within_block else None
                result = self.prune(index, stats, threshold)
                if self.run.propagate == "pruned" and index + 1 < len(self.chain.blocks):
                    self.propagate(index)
            yield result

    def with_model_scope(self) -> Iterator[BlockResult]:
        """Calibrate every block, find one threshold over all scores, then prune every block."""
        collected: list[tuple[Block, BlockStatistics]] = []
        for index, block in enumerate(self.chain.blocks):
            with self.chain.residency.visit(block):
                collected.append((block, self.calibrate(index)))
        threshold = self.threshold(collected)
        for index, (block, stats) in enumerate(collected):
            with self.chain.residency.visit(block):
                result = self.prune(index, stats, threshold)
            yield result

    @torch.no_grad()
    def calibrate(self, index: int) -> BlockStatistics:
        """Run every batch through a dense block and return its layers' statistics."""
        block = self.chain.blocks[index]
        for layer in block.layers:
            if not torch.isfinite(layer.parameter).all():
                raise PruneForgeError(f"layer {layer.name!r} has non-finite weights; the checkpoint is damaged")
        recorder = InputRecorder(block, self.input_kinds)
        with self.run.timed("calibrate"), recorder.recording():
            for batch in self.activations:
                recorder.start(batch.batch)
                output = self.chain.run_block(index, batch.hidden, batch)
                if self.run.propagate == "dense":
                    batch.hidden = output
        collected = {}
        for layer in block.layers:
            inputs, shared = recorder.statistics(layer)
            collected[layer.name] = LayerStatistics({**inputs, **self.gradients.pop(layer.name, {})}, shared)
        return collected

    @torch.no_grad()
    def prune(self, index: int, stats: BlockStatistics, threshold: Threshold | None) -> BlockResult:
        """Make and apply the masks of a block's layers."""
        block = self.chain.blocks[index]
        masks = {}
        with self.run.timed("prune"):
            for layer in block.layers:
                pruned = self.prune_layer(layer, stats[layer.name], threshold)
                weight = layer.weight if pruned.weight is None else pruned.weight
                if pruned.weight is not None and not torch.isfinite(weight).all():
                    raise PruneForgeError(f"metric {self.run.metric.name!r} made non-finite weights in {layer.name!r}")
                layer.write(weight, pruned.mask)
                masks[layer.name] = pruned.mask.cpu()
                self.run.warnings += [f"{layer.name}: {note}" for note in pruned.notes]
        self.run.masks.update(masks)
        return BlockResult(index, block, masks)

    def prune_layer(self, layer: Layer, stats: LayerStatistics, threshold: Threshold | None) -> Pruned:
        """Ask the metric for a layer's mask, or select it by a threshold over several layers."""
        if threshold is not None:
            return Pruned(threshold.select(self.run.metric.checked_score(layer, stats)))
        return self.run.metric.prune_layer(layer, stats, self.run.pattern)

    @torch.no_grad()
    def propagate(self, index: int) -> None:
        """Run every batch through a pruned block, for the next block's inputs."""
        with self.run.timed("propagate"):
            for batch in self.activations:
                batch.hidden = self.chain.run_block(index, batch.hidden, batch)

    @torch.no_grad()
    def threshold(self, collected: Sequence[tuple[Block, BlockStatistics]]) -> Threshold:
        """Return the exact threshold over all scores of the blocks; scores are made anew each pass."""
        assert isinstance(self.run.pattern, Unstructured)
        layers = [layer for block, _ in collected for layer in block.layers]
        count = pruned_count(sum(layer.parameter.numel() for layer in layers), self.run.pattern.sparsity)
        if count == 0:
            return Threshold(-torch.inf, 0)
        with self.run.timed("prune"):
            return smallest(partial(self.scores, collected), count)

    def scores(self, collected: Iterable[tuple[Block, BlockStatistics]]) -> Iterator[Tensor]:
        """Yield the scores of every layer, in the order of the model."""
        for block, stats in collected:
            with self.chain.residency.visit(block):
                for layer in block.layers:
                    yield self.run.metric.checked_score(layer, stats[layer.name])
