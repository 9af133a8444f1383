"""GBLM-Pruner (Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import (
    ColumnSquares,
    GradientMagnitude,
    GradientSquares,
    GradientSum,
    Layer,
    LayerStatistics,
    Metric,
    Statistic,
)


class GBLM(Metric):
    """`|W| * ||X||_2 + alpha * |W| * G`, compared within each output row.

    `||X||_2` is the root of the sum over tokens divided by the number of samples, as in Wanda.
    With g_n the gradient of the mean loss of sample n in the dense model, `G` is `sum |g_n|` (l1) or `sqrt(sum g_n^2)`
    (l2) over the samples. It is not divided by their number, so a good alpha depends on the number of samples and on
    their length; the paper uses alpha 100 with 128 samples of 2048 tokens. With alpha 0 this is Wanda.
    """

    scope = "row"

    class Options(Metric.Options):
        """Options of GBLM and of the paper's ablations."""

        alpha: float = Field(100.0, ge=0, description="weight of the gradient term; gradient_only has no use for it")
        norm: Literal["l1", "l2"] = Field("l1", description="how gradients are gathered; not used if signed")
        gradient_only: bool = Field(False, description="ablation: |W| * G, without activations")
        signed: bool = Field(False, description="ablation: G = |sum g_n|, gradients cancel before the absolute value")

    options: Options

    @property
    def requires(self) -> Sequence[type[Statistic]]:  # type: ignore[override]
        """Column squares unless `gradient_only`, and a gradient statistic unless alpha is 0."""
        options = self.options
        gathered = GradientSum if options.signed else GradientMagnitude if options.norm == "l1" else GradientSquares
        if options.gradient_only:
            return (gathered,)
        # Without the gradient term, no gradients are computed and no cache is written.
        return (ColumnSquares, gathered) if options.alpha > 0 else (ColumnSquares,)

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return |weight| [out, in] times norm [in], plus alpha times |weight| times gradient [out, in]."""
        weight = layer.weight.abs()
        return reduce(torch.add, (self._term(weight, stats[kind]) for kind in self.requires))

    def _term(self, weight: Tensor, statistic: Statistic) -> Tensor:
        """Return |weight| [out, in] times what a statistic says of the inputs or gradients."""
        if isinstance(statistic, ColumnSquares):
            return weight * statistic.per_sample().sqrt()
        gradient = statistic.total.sqrt() if isinstance(statistic, GradientSquares) else statistic.total.abs()
        return weight * gradient if self.options.gradient_only else self.options.alpha * weight * gradient
