"""The loop: for each block, calibrate, score, select, apply, propagate.

There is one loop for all metrics and architectures. What differs comes in through three interfaces: the
adapter's blocks, the statistics a metric requires, and the residency that brings blocks in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pruneforge.adapter import Block
from pruneforge.batch import Batch
from pruneforge.engine.calibrate import InputRecorder, check_weights
from pruneforge.engine.chain import Activations, Chain
from pruneforge.engine.gradient_store import GradientStore, InMemoryGradients
from pruneforge.engine.gradients import gradient_statistics
from pruneforge.engine.group import Group
from pruneforge.engine.run import BlockResult, Run
from pruneforge.errors import PruneForgeError
from pruneforge.layer import Layer, all_finite
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
    gradients: GradientStore | None = None,
    group: Group | None = None,
) -> None:
    """Prune every block of a model in place, but for those that `run` says are finished.

    Args:
        run: What to do; its counts, times and warnings are filled in.
        chain: The model.
        batches: Calibration data; unused if the metric requires no statistic.
        progress: Where to show how far along the run is.
        block_pruned: Called with each block's masks, while the pruned block is still visited.
        gradients: Where gradient statistics wait; by default in memory.
        group: The processes that share the work; by default there is this one alone. Each is given all batches.

    Raises:
        PruneForgeError: A layer does not fit the pattern, weights or activations are not finite, or the
            metric cannot work in the scope asked for. Layers before the one named are already pruned.
    """
    _check(run, chain)
    loop = _Loop(run, chain, batches, progress, block_pruned, gradients or InMemoryGradients(), group or Group())
    scope = getattr(run.pattern, "scope", None)
    finished = loop.with_model_scope() if scope == "model" else loop.block_by_block(within_block=scope == "block")
    for _ in progress.track(finished, "pruning blocks", len(chain.blocks)):
        pass


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


class _Noted(NamedTuple):
    """What a process tells the others of a layer that it pruned."""

    notes: Sequence[str]
    updated: bool


class _Loop:
    def __init__(
        self,
        run: Run,
        chain: Chain,
        batches: Sequence[Batch],
        progress: Progress,
        block_pruned: Callable[[BlockResult], object],
        gradients: GradientStore,
        group: Group,
    ) -> None:
        self.run = run
        self.chain = chain
        self.block_pruned = block_pruned
        self.gradients = gradients
        self.group = group
        requires = run.metric.requires
        self.input_kinds = [kind for kind in requires if issubclass(kind, InputStatistic)]
        self.gradient_kinds = [kind for kind in requires if issubclass(kind, GradientStatistic)]
        self.activations: list[Activations] = []
        if not requires:
            return
        with run.timed("capture"):
            self.activations = chain.capture(group.part(batches))
        if self.gradient_kinds:
            with run.timed("gradients"):
                gradient_statistics(chain, self.activations, self.gradient_kinds, gradients, group, progress)
        if not self.input_kinds:
            self.activations = []

    def block_by_block(self, within_block: bool) -> Iterator[None]:
        """Prune each block before the next is calibrated."""
        last = len(self.chain.blocks) - 1
        for index, block in enumerate(self.chain.blocks):
            pruned = self.run.propagate == "pruned"
            if index < self.run.finished:
                if self.activations and index < last:
                    with self.chain.residency.visit(block, pruned=pruned):
                        self.propagate(index)
            else:
                with self.chain.residency.visit(block):
                    stats = self.with_gradients(block, self.calibrate(index))
                    threshold = self.block_threshold(block, stats) if within_block else None
                    self.prune(index, stats, threshold)
                    del stats
                    if pruned and index < last:
                        self.propagate(index)
            self.advance(index)
            yield

    def with_model_scope(self) -> Iterator[None]:
        """Calibrate every block, find one threshold over all scores, then prune every block."""
        collected: list[tuple[Block, BlockStatistics]] = []
        for index, block in enumerate(self.chain.blocks):
            with self.chain.residency.visit(block):
                collected.append((block, self.calibrate(index)))
            self.advance(index)
        layers = [layer for block, _ in collected for layer in block.layers]
        threshold = self.threshold(layers, partial(self.visited_scores, collected))
        for index, (block, inputs) in enumerate(collected):
            with self.chain.residency.visit(block):
                stats = self.with_gradients(block, inputs)
                if index < self.run.finished:
                    for layer in block.layers:
                        threshold.select(self.score(layer, stats[layer.name]))  # it counts ties as it goes
                else:
                    self.prune(index, stats, threshold)
            yield

    @torch.no_grad()
    def calibrate(self, index: int) -> BlockStatistics:
        """Run every batch through a dense block and return its layers' input statistics."""
        block = self.chain.blocks[index]
        check_weights(block)
        recorder = InputRecorder(block, self.input_kinds)
        with self.run.timed("calibrate"), recorder.recording():
            for batch in self.activations:
                recorder.start(batch.batch)
                output = self.chain.run_block(index, batch.hidden, batch)
                if self.run.propagate == "dense":
                    batch.hidden = output
        recorder.merge(self.group)
        return {layer.name: LayerStatistics(*recorder.statistics(layer)) for layer in block.layers}

    def with_gradients(self, block: Block, inputs: BlockStatistics) -> BlockStatistics:
        """Return the statistics of a block with those of its gradients, read for as long as they are used."""
        if not self.gradient_kinds:
            return inputs
        found = self.gradients.get(block, self.gradient_kinds, self.chain.residency.device)
        return {name: stats.joined(found[name]) for name, stats in inputs.items()}

    @torch.no_grad()
    def prune(self, index: int, stats: BlockStatistics, threshold: Threshold | None) -> None:
        """Make and apply the masks of a block's layers, each in the process that it falls to."""
        block = self.chain.blocks[index]
        masks: dict[str, Tensor] = {}
        noted: dict[str, _Noted] = {}
        # A threshold over several layers is applied in their order, and cheaply: by every process for itself.
        owners = self.owners(block, stats) if threshold is None else dict.fromkeys(stats, self.group.rank)
        error: PruneForgeError | None = None
        with self.run.timed("prune"):
            try:
                for layer in block.layers:
                    if owners[layer.name] == self.group.rank:
                        masks[layer.name], noted[layer.name] = self.apply(layer, stats[layer.name], threshold)
            except PruneForgeError as raised:
                error = raised
            noted = self.group.agree(error, noted)
            if threshold is None:
                masks = {layer.name: self.shared(layer, masks.get(layer.name), owners) for layer in block.layers}
        notes = [f"{layer.name}: {note}" for layer in block.layers for note in noted[layer.name].notes]
        updated = frozenset(name for name, found in noted.items() if found.updated)
        self.run.warnings += notes
        self.run.pruned.update({name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()})
        with self.run.timed("write"):
            self.block_pruned(BlockResult(index, block, masks, notes, updated))

    def owners(self, block: Block, stats: BlockStatistics) -> dict[str, int]:
        """Return which process prunes each layer; those that share an input stay together, to share what is derived."""
        together: dict[int, list[Layer]] = {}
        for layer in block.layers:
            together.setdefault(stats[layer.name].input_key, []).append(layer)
        parts = list(together.values())
        owners = self.group.spread([sum(la.parameter.numel() * la.shape[1] for la in part) for part in parts])
        return {layer.name: owner for part, owner in zip(parts, owners, strict=True) for layer in part}

    def apply(self, layer: Layer, stats: LayerStatistics, threshold: Threshold | None) -> tuple[Tensor, _Noted]:
        """Prune a layer in place and return its mask on the CPU, and what is to be said of it."""
        pruned = self.prune_layer(layer, stats, threshold)
        self.check(layer, pruned)
        layer.write(pruned.mask, pruned.weight)
        return pruned.mask.cpu(), _Noted(pruned.notes, pruned.weight is not None)

    def shared(self, layer: Layer, mask: Tensor | None, owners: dict[str, int]) -> Tensor:
        """Bring a layer that one process has pruned to all of them, and return its mask."""
        if self.group.size > 1:
            device, owner = layer.parameter.device, owners[layer.name]
            empty = torch.empty(layer.shape, dtype=torch.uint8, device=device)
            sent = empty if mask is None else mask.to(device).byte()
            self.group.send(sent, owner)
            self.group.send(layer.parameter.data, owner)
            mask = sent.bool().cpu()
        assert mask is not None
        return mask

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
        if pruned.weight is not None and not all_finite(pruned.weight):
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
        with self.chain.between(index) as continues:
            for batch in self.activations if continues else ():
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
        for block, inputs in collected:
            with self.chain.residency.visit(block):
                stats = self.with_gradients(block, inputs)
                for layer in block.layers:
                    yield self.score(layer, stats[layer.name])

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return a layer's scores [out, in], the same each time."""
        self.reseed(layer)
        return self.run.metric.checked_score(layer, stats)

    def reseed(self, layer: Layer) -> None:
        """Give each layer random numbers of its own, whichever layers came before it in this process."""
        torch.manual_seed(self.run.seed * 0x9E3779B1 + zlib.crc32(layer.name.encode()))
