"""RIA (Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models, 2024)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from pruneforge import ColumnSquares, Layer, LayerStatistics, Metric


class RIA(Metric):
    """`(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a`, compared within each layer (equation 4)."""

    requires = (ColumnSquares,)
    scope = "layer"

    class Options(Metric.Options):
        """Options of RIA."""

        a: float = Field(0.5, ge=0, description="exponent of the input's norm")

    options: Options

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return relative importance [out, in] times norm [in]; a row or column of zeros counts as unimportant."""
        weight = layer.weight.abs()
        relative = weight / weight.sum(0).clamp_min(1e-30) + weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
        return relative * stats[ColumnSquares].per_sample().pow(self.options.a / 2)
