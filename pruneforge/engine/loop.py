"""The loop: for each block, calibrate, score, select, apply, propagate.

There is one loop for all metrics and architectures. What differs comes in through three interfaces: the
adapter's blocks, the statistics a metric requires, and the residency that brings blocks in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch import Tensor

from pruneforge.engine.chain import Activations, Chain, with_hidden_states
from pruneforge.engine.gradient_store import GradientStore, InMemoryGradients
from pruneforge.engine.gradients import gradient_statistics
from pruneforge.engine.masking import Applier, BlockStatistics
from pruneforge.engine.processes import Group
from pruneforge.engine.recorder import InputRecorder, check_weights
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.run import BlockResult, Run, required_statistics
from pruneforge.interfaces.statistics import GradientStatistic, InputStatistic, LayerStatistics
from pruneforge.progress import Progress


def prune_blocks(
    runs: Sequence[Run],
    chain: Chain,
    batches: Sequence[Batch],
    progress: Progress,
    block_pruned: Callable[[Run, BlockResult], object],
    gradients: GradientStore | None = None,
    group: Group | None = None,
) -> None:
    """Prune every block of a model in place, but for those that a run says are finished.

    Args:
        runs: What to do; counts and warnings are filled in, and each run's output is given its finished blocks.
            Several runs may differ in pattern and metric, need `propagate="dense"`, and share forward passes,
            statistics and what is derived from these; the model is left as the last one prunes it.
        chain: The model.
        batches: Calibration data; unused if the metric requires no statistic.
        progress: Where to show how far along the work is.
        block_pruned: Called with each run and block's masks after its output, while the block is still visited.
        gradients: Where gradient statistics wait; by default in memory.
        group: The processes that share the work; by default there is this one alone. Each is given all batches.

    Raises:
        PruneForgeError: A layer does not fit the pattern, weights or activations are not finite, or the
            metric cannot work in the scope asked for. Layers before the one named are already pruned.
    """
    for run in runs:
        _check(run, chain)
    loop = _Loop(runs, chain, batches, progress, block_pruned, gradients or InMemoryGradients(), group or Group())
    model_wide = any(run.scope == "model" for run in runs)
    with closing(loop.with_model_scope() if model_wide else loop.block_by_block()) as finished:
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


class _Loop:
    def __init__(
        self,
        runs: Sequence[Run],
        chain: Chain,
        batches: Sequence[Batch],
        progress: Progress,
        block_pruned: Callable[[Run, BlockResult], object],
        gradients: GradientStore,
        group: Group,
    ) -> None:
        self.runs = runs
        self.chain = chain
        self.gradients = gradients
        self.group = group
        self.apply = Applier(chain, group, block_pruned)
        self.profile = runs[0].profile
        self.dense = runs[0].propagate == "dense"
        requires = required_statistics(runs)
        self.input_kinds = [kind for kind in requires if issubclass(kind, InputStatistic)]
        self.gradient_kinds = [kind for kind in requires if issubclass(kind, GradientStatistic)]
        self.activations: list[Activations] = []
        if not requires:
            return
        with self.profile.stage("capture"):
            self.activations = chain.capture(group.part(batches))
        if self.gradient_kinds:
            with self.profile.stage("gradients"):
                gradient_statistics(chain, self.activations, self.gradient_kinds, gradients, group, progress)
        if not self.input_kinds:
            self.activations = []

    def block_by_block(self) -> Generator[None, None, None]:
        """Calibrate a block, prune it, and hand the hidden states on to the next one.

        With `propagate="dense"` calibration itself hands them on: they are what the block gave before it was pruned.
        With "pruned" they have to pass the pruned block as well. That pass is made together with the next block's
        calibration, batch by batch, so that each hidden state is fetched and kept once instead of twice; the pruned
        block is held for as long. Never more than these two blocks are held.
        """
        last = len(self.chain.blocks) - 1
        with ExitStack() as held:  # the pruned block that batches still have to pass
            waiting: int | None = None  # its index
            for index, block in enumerate(self.chain.blocks):
                # A resumed run has finished some blocks; another pattern of the same pass may not have.
                runs = [run for run in self.runs if index >= run.finished]
                onward = bool(self.activations) and index < last
                if runs or onward:
                    with ExitStack() as here:
                        # A block that all runs have finished is read as they left it, unless batches pass it dense.
                        here.enter_context(self.chain.residency.visit(block, pruned=not (runs or self.dense)))
                        if runs:
                            stats = self.with_gradients(block, self.calibrate(index, through=waiting))
                            held.close()  # all batches have passed it
                            self.prune(runs, index, stats)
                            del stats  # before the next block's are made
                        waiting = None
                        # Code of the model's own between two blocks needs the outputs of all batches first.
                        if onward and runs and not self.dense and not self.chain.continues(index):
                            waiting = index
                            held.push(here.pop_all())  # the visit ends with the next block's calibration
                        elif onward and not (runs and self.dense):
                            self.propagate(index)
                self.advance(index)
                yield

    def with_model_scope(self) -> Generator[None, None, None]:
        """Calibrate every block, find thresholds over the scores of all, then prune every block."""
        collected: list[tuple[Block, BlockStatistics]] = []
        for index, block in enumerate(self.chain.blocks):
            with self.chain.residency.visit(block):
                collected.append((block, self.calibrate(index)))
            self.advance(index)
        layers = [layer for block, _ in collected for layer in block.layers]
        for run in self.runs:
            if run.scope == "model":
                self.apply.find_threshold(run, layers, partial(self.visited_scores, run, collected))
        for index, (block, inputs) in enumerate(collected):
            with self.chain.residency.visit(block):
                self.prune(self.runs, index, self.with_gradients(block, inputs))
            yield

    @torch.no_grad()
    def calibrate(self, index: int, through: int | None = None) -> BlockStatistics:
        """Run every batch through a dense block and return its layers' input statistics.

        Args:
            index: The block.
            through: The pruned block before, if batches still wait at its entry.
        """
        block = self.chain.blocks[index]
        check_weights(block)
        recorder = InputRecorder(block, self.input_kinds, stop=not self.dense)
        for batch, hidden in with_hidden_states(self.activations):
            if through is not None:
                with self.profile.stage("propagate", through):
                    hidden = batch.hidden = self.chain.run_block(through, hidden, batch)
            if not block.layers and not self.dense:
                continue  # all of them are excluded, and nobody needs what comes out
            with self.profile.stage("calibrate", index), recorder.recording(batch.batch):
                output = self.chain.run_block(index, hidden, batch)
                if self.dense:
                    batch.hidden = output
        self.profile.settle("calibrate", index)
        recorder.merge(self.group)
        return {layer.name: LayerStatistics(*recorder.statistics(layer)) for layer in block.layers}

    def with_gradients(self, block: Block, inputs: BlockStatistics) -> BlockStatistics:
        """Return the statistics of a block with those of its gradients, read for as long as they are used."""
        if not self.gradient_kinds:
            return inputs
        found = self.gradients.get(block, self.gradient_kinds, self.chain.residency.device)
        return {name: stats.joined(found[name]) for name, stats in inputs.items()}

    def prune(self, runs: Sequence[Run], index: int, stats: BlockStatistics) -> None:
        """Make and apply each run's masks of a visited block, every one on the dense weights."""
        layers = self.chain.blocks[index].layers
        dense = [layer.parameter.detach().clone() for layer in layers] if len(runs) > 1 else []
        previous: Run | None = None
        for run in runs:
            if previous is not None:
                previous.output.settle()  # it may still read the weights that are made dense again
                for layer, weight in zip(layers, dense, strict=True):
                    layer.parameter.data.copy_(weight)
            self.apply.prune(run, index, stats)
            previous = run

    @torch.no_grad()
    def propagate(self, index: int) -> None:
        """Run every batch through a pruned block, for the next block's inputs."""
        for batch, hidden in with_hidden_states(self.activations):
            with self.profile.stage("propagate", index):
                batch.hidden = self.chain.run_block(index, hidden, batch)
        self.profile.settle("propagate", index)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Make the next block's inputs of a block's outputs, for every batch, where the model has code between."""
        if self.activations and self.chain.continues(index):
            with self.profile.stage("propagate", index), self.chain.between(index):
                for batch, hidden in with_hidden_states(self.activations):
                    batch.hidden = self.chain.transition(index, hidden, batch)

    def visited_scores(self, run: Run, collected: Sequence[tuple[Block, BlockStatistics]]) -> Iterator[Tensor]:
        """Yield the scores of every layer, in the order of the model, made anew and held one at a time."""
        for block, inputs in collected:
            with self.chain.residency.visit(block):
                stats = self.with_gradients(block, inputs)
                for layer in block.layers:
                    yield self.apply.score(run, layer, stats[layer.name])
