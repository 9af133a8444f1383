"""OWL (Yin et al., Outlier Weighed Layerwise Sparsity (OWL), ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from pruneforge import Allocator, Block, ColumnSquares, Layer, LayerStatistics, spread


class OWL(Allocator):
    """Blocks with more outliers keep more weights.

    A block's outliers D_b are the share of its scores `|W| * ||X||_2`, all layers together, above `m` times their mean.
    Its density is `2 lam (D_b - min D) / (max D - min D)`, shifted so that the mean over blocks is `1 - sparsity`; all
    layers of a block have the same.
    """

    requires = (ColumnSquares,)

    class Options(Allocator.Options):
        """Options of OWL."""

        lam: float = Field(0.08, ge=0, le=0.5, description="most that a block's density may differ from the mean's")
        m: float = Field(5.0, gt=0, description="how many times the mean score an outlier is")

    options: Options

    def measure(
        self, block: Block, stats: Mapping[str, LayerStatistics], score: Callable[[Layer], Tensor]
    ) -> dict[str, Any]:
        """Return the share of outliers among the block's scores."""
        scores = [layer.weight.abs() * stats[layer.name][ColumnSquares].per_sample().sqrt() for layer in block.layers]
        count = sum(each.numel() for each in scores) or 1
        threshold = self.options.m * sum(each.double().sum().item() for each in scores) / count
        return {"outliers": sum(int((each > threshold).sum()) for each in scores) / count}

    def allocate(
        self, measures: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer, which is its block's."""
        outliers = {block: measures[block]["outliers"] for block, layers in sizes.items() if layers}
        density = spread(outliers, 1 - sparsity, self.options.lam)
        return {name: max(1 - density[block], 0.01) for block, layers in sizes.items() for name in layers}
