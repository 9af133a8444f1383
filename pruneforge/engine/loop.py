"""The loop: for each block, calibrate, score, select, apply, propagate.

One loop serves all metrics and architectures. They differ in the adapter's blocks, the statistics that a metric
requires, and the residency that loads blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

from torch import Tensor

from pruneforge.engine.allocation import allocate
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import GradientStore, InMemoryGradientStore
from pruneforge.engine.gradients import gradient_statistics
from pruneforge.engine.guard import metric_score
from pruneforge.engine.masking import Applier, check_count, reached
from pruneforge.engine.processes import Group
from pruneforge.engine.stream import BlockStatistics, Flow, Streams
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.recovery import recovers_blocks
from pruneforge.interfaces.run import BlockResult, Run, required_statistics
from pruneforge.progress import Progress

Data = Mapping[str, Sequence[Batch]]
"""Calibration data by name; the first are those that requirements without a name mean."""


def prune_blocks(
    runs: Sequence[Run],
    chain: Chain,
    data: Data,
    progress: Progress,
    block_pruned: Callable[[Run, BlockResult], object],
    gradient_stores: Mapping[str, GradientStore] | None = None,
    group: Group | None = None,
) -> None:
    """Prune every block of a model in place, except blocks that a run has finished already.

    Args:
        runs: The runs; their counts and warnings are filled in, and each run's output is given its finished blocks.
            Several runs must have `propagate="dense"` and may differ in pattern and metric. They share forward passes,
            statistics and values derived from statistics; the model ends up as the last run prunes it.
        chain: The model.
        data: Calibration data; unused if nothing requires a statistic.
        progress: Shows progress.
        block_pruned: Called with each run and block result, after the run's output and while the block is loaded.
        gradient_stores: Keep the gradient statistics of each set of data; in memory by default.
        group: The processes that share the work; only this one by default. Each is given all batches.

    Raises:
        PruneForgeError: A layer does not fit the pattern, weights or activations are not finite, or the metric
            cannot work in the requested scope. Layers before the named one are already pruned.
    """
    for run in runs:
        _check(run, chain)
    gradient_stores = gradient_stores or {name: InMemoryGradientStore() for name in data}
    loop = _Loop(runs, chain, data, progress, block_pruned, gradient_stores, group or Group())
    model_wide = any(run.scope == "model" for run in runs)
    with closing(loop.with_model_scope() if model_wide else loop.block_by_block()) as finished:
        for _ in progress.track(finished, "pruning blocks", len(chain.blocks)):
            pass


def _check(run: Run, chain: Chain) -> None:
    """Raise if a layer does not fit the pattern or shares its weight, before anything is changed."""
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
    """The state of one pass over the blocks: runs, batches in flight, and the parts that work on them."""

    def __init__(
        self,
        runs: Sequence[Run],
        chain: Chain,
        data: Data,
        progress: Progress,
        block_pruned: Callable[[Run, BlockResult], object],
        gradient_stores: Mapping[str, GradientStore],
        group: Group,
    ) -> None:
        self.runs = runs
        self.chain = chain
        self.gradient_stores = gradient_stores
        self.apply = Applier(chain, group, block_pruned)
        self.profile = runs[0].profile
        self.dense = runs[0].propagate == "dense"
        targets = next((run.recovery.targets for run in runs if run.recovery is not None), None)
        flow = Flow(chain, group, self.profile, self.dense, targets)
        captured = {}
        if any(run.uses_data for run in runs):
            with self.profile.stage("capture"):
                captured = {name: chain.capture(group.part(batches)) for name, batches in data.items()}
        self.streams = Streams(captured, required_statistics(runs), flow)
        for name, kinds in self.streams.model_gradients().items():
            with self.profile.stage("gradients"):
                gradient_statistics(chain, captured[name], kinds, gradient_stores[name], group, progress)
        allocate(runs, captured, replace(flow, dense=True, targets=None), gradient_stores, progress)

    def block_by_block(self) -> Generator[None, None, None]:
        """Calibrate and prune each block, and compute the next one's inputs; yield after each block.

        With `propagate="dense"` the outputs of calibration are the next block's inputs. With "pruned" each batch must
        also pass the pruned block. That pass is fused with the next block's calibration, batch by batch, so that each
        hidden state is fetched and stored once instead of twice. The pruned block stays loaded until then; at most
        these two blocks are loaded at a time.
        """
        last = len(self.chain.blocks) - 1
        with ExitStack() as held:  # keeps the pruned block loaded until all batches have passed it
            waiting: int | None = None  # its index
            for index, block in enumerate(self.chain.blocks):
                # Resumed runs of one pass may have stopped at different blocks.
                runs = [run for run in self.runs if index >= run.finished]
                onward = bool(self.streams) and index < last
                if onward and not runs and self.streams.beside:
                    with self.chain.residency.visit(block):
                        self.streams.pass_beside(index)
                if runs or onward:
                    with ExitStack() as here:
                        # A block that all runs have finished is read from the output, unless batches pass it dense.
                        here.enter_context(self.chain.residency.visit(block, pruned=not (runs or self.dense)))
                        if runs:
                            stats = self.with_gradients(block, self.streams.calibrate(index, through=waiting))
                            held.close()  # all batches have passed the block before
                            self.prune(runs, index, stats)
                            del stats  # free this block's statistics before the next block allocates its own
                        waiting = None
                        # Not fused where the model has code between the two blocks: running it takes stem and head,
                        # and budgets allow for a block with these or for a second block, not for all three.
                        if onward and runs and not self.dense and not self.chain.continues(index):
                            waiting = index
                            held.push(here.pop_all())  # extend the visit until the next block's calibration
                        elif onward and not (runs and self.dense):
                            self.streams.propagate(index)
                self.streams.advance(index)
                yield

    def with_model_scope(self) -> Generator[None, None, None]:
        """Calibrate every block, find a threshold over all scores, then prune every block; yield after each.

        Scores are computed again for each pass of the threshold search and for the masks: all of them together would
        take as much memory as the weights.
        """
        collected: list[tuple[Block, BlockStatistics]] = []
        wide = [run for run in self.runs if run.scope == "model"]
        layers: list[list[Layer]] = [[] for _ in wide]
        for index, block in enumerate(self.chain.blocks):
            with self.chain.residency.visit(block):
                collected.append((block, self.streams.calibrate(index)))
                routed = any(layer.routed for layer in block.layers)
                stats = self.with_gradients(*collected[-1]) if routed else collected[-1][1]
                for run, of_run in zip(wide, layers, strict=True):
                    of_run += reached(block.layers, stats, run.requires)
                del stats
            self.streams.advance(index)
        for run, of_run in zip(wide, layers, strict=True):
            self.apply.find_threshold(run, of_run, partial(self.visited_scores, run, collected))
        for index, (block, of_block) in enumerate(collected):
            with self.chain.residency.visit(block):
                self.prune(self.runs, index, self.with_gradients(block, of_block))
            yield
        for run, of_run in zip(wide, layers, strict=True):
            check_count(run, of_run, sum(run.pruned.values()), "the model")

    def with_gradients(self, block: Block, stats: BlockStatistics) -> BlockStatistics:
        """Return a block's statistics joined with those of the model's gradients."""
        return self.streams.with_model_gradients(block, stats, self.gradient_stores)

    def prune(self, runs: Sequence[Run], index: int, stats: BlockStatistics) -> None:
        """Prune a visited block for each run, each time from the dense weights."""
        block = self.chain.blocks[index]
        recovers = any(recovers_blocks(run.recovery) for run in runs)
        changing = (
            [p.detach() for p in block.module.parameters()] if recovers else [layer.matrix() for layer in block.layers]
        )
        dense = [tensor.clone() for tensor in changing] if len(runs) > 1 else []
        previous: Run | None = None
        for run in runs:
            if previous is not None:
                previous.output.settle()  # it may still read the weights that are made dense again
                for tensor, weight in zip(changing, dense, strict=True):
                    tensor.copy_(weight)
            self.apply.prune(run, index, stats, self.streams.main)
            previous = run
        if self.streams.main is not None:
            self.streams.main.forget()

    def visited_scores(self, run: Run, collected: Sequence[tuple[Block, BlockStatistics]]) -> Iterator[Tensor]:
        """Yield the scores of every layer that data reached, in model order, computing one layer at a time."""
        for block, of_block in collected:
            with self.chain.residency.visit(block):
                stats = self.with_gradients(block, of_block)
                for layer in reached(block.layers, stats, run.requires):
                    yield metric_score(run, layer, stats[layer.name])
