"""DLP (Chen et al., DLP: Dynamic Layerwise Pruning in Large Language Models, ICML 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Allocator, Block, ColumnSquares, Layer, LayerStatistics, spread


class DLP(Allocator):
    """Blocks whose median score is high lose more weights.

    The unimportance u_b of a block is the median of its scores `|W| * ||X||_2`, all layers together, and its relative
    importance `1 - u_b / sum u`. Densities rise linearly with importance, `2 lam` from the least to the most, and are
    shifted so that their mean over blocks is `1 - sparsity`; all layers of a block have the same. The sum thus cancels.

    The paper's code was not at hand: the norm of the scores, the mapping and the default of `lam` are OWL's. Of an even
    number of scores the median is the lower one of the middle.
    """

    requires = (ColumnSquares,)

    class Options(Allocator.Options):
        """Options of DLP."""

        lam: float = Field(0.08, ge=0, le=0.5, description="half of how far the blocks' densities lie apart")

    options: Options

    def measure(
        self, block: Block, stats: Mapping[str, LayerStatistics], score: Callable[[Layer], Tensor]
    ) -> dict[str, Any]:
        """Return the median of the block's scores; nothing of a block without scores."""
        scores = [
            (layer.weight.abs() * stats[layer.name][ColumnSquares].per_sample().sqrt()).flatten()
            for layer in block.layers
        ]
        return {"median": torch.cat(scores).median().item()} if scores else {}

    def allocate(
        self, measures: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer, which is its block's."""
        medians = {block: measured["median"] for block, measured in measures.items() if measured}
        share = spread(medians, sparsity, self.options.lam)
        return {name: share.get(block, sparsity) for block, layers in sizes.items() for name in layers}
