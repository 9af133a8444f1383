"""The interface of allocators, which give each layer its sparsity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pruneforge.interfaces import options
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import InputStatistic, LayerStatistics
from pruneforge.progress import Progress

Sizes = Mapping[str, Mapping[str, int]]
"""Number of weights of each layer, by name, for each block, by name."""


class Trials(ABC):
    """What a search is given: it prunes by allocations of its choice, and sees how good the models are.

    Attributes:
        folder: Folder beside the run's output for what the search keeps, so that it can go on after a kill; it may not
            exist yet. `None` for a run without an output.
        seed: The run's seed.
        identity: Everything besides the allocation and the evaluator that decides what `evaluate` returns, as JSON
            holds it: the run's settings without the allocator's, and hashes of model, data and plugins.
        progress: Progress bars.
        found: What the report shall say of the search, as JSON holds it; the search fills it in.
    """

    folder: Path | None
    seed: int
    identity: Mapping[str, Any]
    progress: Progress
    found: dict[str, Any]

    @abstractmethod
    def evaluate(self, allocation: Mapping[str, float], task: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Prune a copy of the dense model as the run does, by an allocation, and evaluate it.

        It takes the time of a run and of an evaluation, and the memory of the whole model. Nothing is kept of it.

        Args:
            allocation: Sparsity of each layer, by name; it is brought to the run's exact budget.
            task: Name of an evaluator.
            options: Its options.

        Returns:
            What `pruneforge.evaluate` returns.

        Raises:
            PruneForgeError: The run or the evaluation fails, or a layer has no sparsity.
        """


class Allocator(options.Configurable, ABC):
    """Decides, before the first block is pruned, how many weights each layer loses.

    A subclass overrides `allocate`, and `measure` if it looks at the model: it is then called in a
    pass through the dense model. The engine brings what `allocate` returns
    to exactly the number of weights that the run's sparsity says. One that overrides `search` tries allocations out
    instead; its `allocate` is what it starts from, and it is not asked to `measure`.

    Attributes:
        requires: Statistics of the dense model's inputs that `measure` needs.
        uses_scores: Whether `measure` calls `score`.
    """

    requires: Sequence[type[InputStatistic]] = ()
    uses_scores: ClassVar[bool] = False

    class Options(options.Options):
        """Options of every allocator."""

    def measure(
        self, block: Block, stats: Mapping[str, LayerStatistics], score: Callable[[Layer], Tensor]
    ) -> dict[str, Any]:
        """Return what `allocate` needs to know of a block, in numbers that JSON holds.

        Args:
            block: The block, dense.
            stats: The statistics that `requires` names, by layer name; with `uses_scores` also the metric's.
            score: Returns a layer's scores [out, in] by the run's metric.
        """
        return {}

    @abstractmethod
    def allocate(self, measures: Mapping[str, Mapping[str, Any]], sizes: Sizes, sparsity: float) -> dict[str, float]:
        """Return a sparsity for each layer, by name.

        Args:
            measures: What `measure` returned, by block name; empty unless `measure` is overridden.
            sizes: The blocks' layers.
            sparsity: Share of all weights to prune. A result with another mean is shifted, the same for all layers.
        """

    def search(self, trials: Trials, sizes: Sizes, sparsity: float) -> dict[str, float]:
        """Return a sparsity for each layer, by name, found by pruning and evaluating.

        Args:
            trials: Prunes and evaluates.
            sizes: As for `allocate`.
            sparsity: As for `allocate`.
        """
        return self.allocate({}, sizes, sparsity)


def searches(allocator: Allocator) -> bool:
    """Return whether an allocator prunes and evaluates to find its allocation."""
    return type(allocator).search is not Allocator.search


def measures_blocks(allocator: Allocator) -> bool:
    """Return whether an allocator looks at the model's blocks."""
    return type(allocator).measure is not Allocator.measure
