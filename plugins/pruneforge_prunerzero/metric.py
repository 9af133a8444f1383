"""Pruner-Zero (Dong et al., Evolving Symbolic Pruning Metric from Scratch for Large Language Models, ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from pruneforge import GradientSquares, Layer, LayerStatistics, Metric


class PrunerZero(Metric):
    """`|W| * |W| * mms(|G|)`, compared within each output row: the metric that the paper's evolution ends with.

    G is the root of the sum over samples of the squared gradient, and `mms(x) = (x - min x) / (max x - min x)` over
    the layer. The authors multiply gradients by 100 so that they do not vanish in half precision; that cancels in
    `mms`, as any factor of the gradients does. Gradients that are all equal say nothing: there `mms` would be 0 / 0,
    and is 1. The authors' code takes gradients on the training text of WikiText-2; here they are of the calibration
    data.
    """

    requires = (GradientSquares,)
    scope = "row"

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return the squared weight [out, in] times its gradient, which is scaled to [0, 1]."""
        gradient = stats[GradientSquares].total.sqrt()
        low, high = gradient.aminmax()
        scaled = torch.where(high > low, (gradient - low) / (high - low), 1.0)
        return layer.weight.square() * scaled
