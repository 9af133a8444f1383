"""The interface of allocators, which give each layer its sparsity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from pruneforge.interfaces import options
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import InputStatistic, LayerStatistics

Sizes = Mapping[str, Mapping[str, int]]
"""Number of weights of each layer, by name, for each block, by name."""


class Allocator(options.Configurable, ABC):
    """Decides, before the first block is pruned, how many weights each layer loses.

    A subclass overrides `allocate`, and `measure` if it looks at the model: it is then called in a
    pass through the dense model. The engine brings what `allocate` returns
    to exactly the number of weights that the run's sparsity says.

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


def measures_blocks(allocator: Allocator) -> bool:
    """Return whether an allocator looks at the model's blocks."""
    return type(allocator).measure is not Allocator.measure
