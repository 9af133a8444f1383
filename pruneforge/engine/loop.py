"""The loop: for each block, calibrate, score, select, apply, propagate.

There is one loop for all metrics and architectures. What differs comes in through three interfaces: the
adapter's blocks, the statistics a metric requires, and the residency that brings blocks in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pruneforge.adapter import Block
from pruneforge.batch import Batch
from pruneforge.engine.calibrate import InputRecorder, check_weights
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
    """Raise what can be raised before anything is changed."""
    names: dict[int, list[str]] = {}
    for name, parameter in chain.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for block in chain.blocks:
        for layer in block.layers:
            run.pattern.check(layer.name, layer.shape[1])
            sharing = names[id(layer.parameter)]
            if len(sharing) > 1:
                raise PruneForgeError(
                    f"{' and '.join(repr(name) for name in sharing)} share one weight, which would be pruned twice; "
                    "untie them before pruning"
                )
    for kind in run.metric.requires:
        if not issubclass(kind, InputStatistic | GradientStatistic):
            raise PruneForgeError(
                f"metric {run.metric.name!r} requires {kind.__name__}, which is neither an InputStatistic nor a "
                "GradientStatistic, so nothing would feed it"
            )


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
                threshold = self.block_threshold(block, stats) if within_block else None
                result = self.prune(index, stats, threshold)
                if self.run.propagate == "pruned" and index + 1 < len(self.chain.blocks):
                    self.propagate(index)
            self.advance(index)
            yield result

    def with_model_scope(self) -> Iterator[BlockResult]:
        """Calibrate every block, find one threshold over all scores, then prune every block."""
        collected: list[tuple[Block, BlockStatistics]] = []
        for index, block in enumerate(self.chain.blocks):
            with self.chain.residency.visit(block):
                collected.append((block, self.calibrate(index)))
            self.advance(index)
        layers = [layer for block, _ in collected for layer in block.layers]
        threshold = self.threshold(layers, partial(self.visited_scores, collected))
        for index, (block, stats) in enumerate(collected):
            with self.chain.residency.visit(block):
                result = self.prune(index, stats, threshold)
            yield result

    @torch.no_grad()
    def calibrate(self, index: int) -> BlockStatistics:
        """Run every batch through a dense block and return its layers' statistics."""
        block = self.chain.blocks[index]
        check_weights(block)
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
            gradients = self.gradients.pop(layer.name, {})
            for statistic in gradients.values():
                statistic.to(self.chain.residency.device)
            collected[layer.name] = LayerStatistics({**inputs, **gradients}, shared)
        return collected

    @torch.no_grad()
    def prune(self, index: int, stats: BlockStatistics, threshold: Threshold | None) -> BlockResult:
        """Make and apply the masks of a block's layers."""
        block = self.chain.blocks[index]
        masks = {}
        with self.run.timed("prune"):
            for layer in block.layers:
                pruned = self.prune_layer(layer, stats[layer.name], threshold)
                self.check(layer, pruned)
                weight = layer.weight if pruned.weight is None else pruned.weight
                layer.write(weight, pruned.mask)
                masks[layer.name] = pruned.mask.cpu()
                self.run.warnings += [f"{layer.name}: {note}" for note in pruned.notes]
        self.run.masks.update(masks)
        return BlockResult(index, block, masks)

    def prune_layer(self, layer: Layer, stats: LayerStatistics, threshold: Threshold | None) -> Pruned:
        """Ask the metric for a layer's mask, or select it by a threshold over several layers."""
        if threshold is not None:
            return Pruned(threshold.select(self.score(layer, stats)))
        self.reseed(layer)
        return self.run.metric.prune_layer(layer, stats, self.run.pattern)

    def check(self, layer: Layer, pruned: Pruned) -> None:
        """Raise unless a metric's mask fits the pattern, and its weights are finite."""
        run, mask = self.run, pruned.mask
        if mask.dtype != torch.bool or mask.shape != layer.shape:
            raise PruneForgeError(
                f"metric {run.metric.name!r} made a mask of {mask.dtype} {tuple(mask.shape)} for layer {layer.name!r}; "
                f"it must be boolean {layer.shape}"
            )
        # A method with its own comparison groups rounds in each of them; N:M binds it all the same.
        own_groups = isinstance(run.pattern, Unstructured) and (
            run.metric.scope is None or run.pattern.scope in ("block", "model")
        )
        if not own_groups and not run.pattern.fits(mask):
            raise PruneForgeError(
                f"metric {run.metric.name!r} made a mask for layer {layer.name!r} that does not fit {run.pattern}"
            )
        if pruned.weight is not None and not torch.isfinite(pruned.weight).all():
            raise PruneForgeError(f"metric {run.metric.name!r} made non-finite weights in layer {layer.name!r}")

    @torch.no_grad()
    def propagate(self, index: int) -> None:
        """Run every batch through a pruned block, for the next block's inputs."""
        with self.run.timed("propagate"):
            for batch in self.activations:
                batch.hidden = self.chain.run_block(index, batch.hidden, batch)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Make the next block's inputs of a block's outputs, for every batch."""
        if index + 1 < len(self.chain.blocks):
            for batch in self.activations:
                batch.hidden = self.chain.transition(index, batch.hidden, batch)

    @torch.no_grad()
    def threshold(self, layers: Sequence[Layer], scores: Callable[[], Iterable[Tensor]]) -> Threshold:
        """Return the exact threshold over the scores of several layers; `scores` yields them, in several passes."""
        assert isinstance(self.run.pattern, Unstructured)
        count = pruned_count(sum(layer.parameter.numel() for layer in layers), self.run.pattern.sparsity)
        if count == 0:
            return Threshold(-torch.inf, 0)
        with self.run.timed("prune"):
            return smallest(scores, count)

    @torch.no_grad()
    def block_threshold(self, block: Block, stats: BlockStatistics) -> Threshold:
        """Return the threshold over one visited block, whose scores are held together."""
        scores = [self.score(layer, stats[layer.name]) for layer in block.layers]
        return self.threshold(block.layers, lambda: scores)

    def visited_scores(self, collected: Iterable[tuple[Block, BlockStatistics]]) -> Iterator[Tensor]:
        """Yield the scores of every layer, in the order of the model, made anew and held one at a time."""
        for block, stats in collected:
            with self.chain.residency.visit(block):
                for layer in block.layers:
                    yield self.score(layer, stats[layer.name])

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return a layer's scores [out, in], the same each time."""
        self.reseed(layer)
        return self.run.metric.checked_score(layer, stats)

    def reseed(self, layer: Layer) -> None:
        """Give each layer random numbers of its own, whichever layers came before it in this process."""
        torch.manual_seed(self.run.seed * 0x9E3779B1 + zlib.crc32(layer.name.encode()))
