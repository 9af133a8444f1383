"""Wanda (Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024)."""

from __future__ import annotations

from torch import Tensor

from pruneforge import ColumnSquares, Layer, LayerStatistics, Metric


class Wanda(Metric):
    """`|W_ij| * ||X_j||_2`, compared within each output row (equation 1).

    The norm over the tokens of all samples is divided by the square root of the number of samples, as in the authors'
    code. Within a row this factor changes nothing.
    """

    requires = (ColumnSquares,)
    scope = "row"

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return |weight| [out, in] times the input norm [in]."""
        return layer.weight.abs() * stats[ColumnSquares].per_sample().sqrt()
