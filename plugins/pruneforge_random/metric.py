"""Random scores, the control that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from pruneforge import Layer, LayerStatistics, Metric


class Random(Metric):
    """Uniform random numbers from the run's seed, compared within each output row."""

    scope = "row"
    control = True

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return random numbers [out, in]; each layer has its own, the same on every device."""
        return torch.rand(layer.shape, dtype=layer.weight.dtype).to(layer.parameter.device)
