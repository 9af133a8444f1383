"""Magnitude pruning (Han et al., 2015; Zhu and Gupta, 2017)."""

from __future__ import annotations

from torch import Tensor

from pruneforge import Layer, LayerStatistics, Metric


class Magnitude(Metric):
    """`|W|`, compared within each layer."""

    scope = "layer"
    control = True

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return the absolute values of the weights [out, in]."""
        return layer.weight.abs()
