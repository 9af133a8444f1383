"""Wanda++ (Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients, ACL Findings 2025)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from pruneforge import Batch, BlockGradientStatistic, ColumnSquares, GradientSquares, Layer, LayerStatistics, Metric


class RegionalSquares(BlockGradientStatistic, GradientSquares):
    """Sum over samples of the squared gradient of the norm of the block's output, `total` [out, in]."""

    @staticmethod
    def loss(output: Tensor, batch: Batch, target: Tensor | None) -> Tensor:
        """Return the norm of each sample's output [samples], without its padding."""
        if batch.valid is not None:
            output = output * batch.valid[:, :, None]
        return output.flatten(1).norm(dim=1)


class WandaPP(Metric):
    """`(alpha G + ||X_j||_2) |W|`, compared within each output row (equations 2 to 4).

    G is the root of the mean over samples of the squared gradient of `||f(X)||_2`, where f is the block. The paper's
    optimization of the block after each mask is not part of the score; a recovery takes its place.
    """

    requires = (ColumnSquares, RegionalSquares)
    scope = "row"

    class Options(Metric.Options):
        """Options of Wanda++."""

        alpha: float = Field(100.0, ge=0, description="weight of the gradients beside the activations")

    options: Options

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return |weight| [out, in] times its gradient and the input norm [in]."""
        regional = stats[RegionalSquares]
        gradient = (regional.total / regional.samples).sqrt()
        return layer.weight.abs() * (self.options.alpha * gradient + stats[ColumnSquares].per_sample().sqrt())
