"""GAPrune (Tang and Yang, GAPrune: Gradient-Alignment Pruning for Domain-Aware Embeddings, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import GradientSquares, GradientSum, Layer, LayerStatistics, Metric, On, Statistic

GENERAL = "general"
"""Name of the stream that is not of the domain."""

RANKED = 100_000
"""Most weights of a layer that the rank correlation is computed of."""

SAME_ORDER = 0.999
"""Rank correlation above which a score is said to order weights as magnitude does."""


class GAPrune(Metric):
    """`((F_dom - beta F_gen) |w| + gamma sqrt|w|) (1 + alpha s)`, compared over the whole model.

    The calibration data are of the domain, the stream `general` of what the model was trained for. `F` is the mean over
    samples of the squared gradient of each, the diagonal of the empirical Fisher information. `s` is the cosine of the
    two mean gradients, one number for each layer's weight matrix. The paper takes gradients of InfoNCE on a decoder
    that embeds texts, with a hard negative for each pair. Here `objective="contrastive"` has the other pairs of a batch
    as negatives alone, and is for encoders; without an objective gradients are of the model's own loss.

    The authors' released code is another formula, which is not offered here: softplus of the sum of both terms, with
    the alignment on the first term only, from the products of the two normalised gradients entry by entry, smoothed
    over 3 x 3 and clamped; and F of mini-batches, kept in float16, where whatever is below 6e-8 becomes zero.

    Where gradients are small, `gamma sqrt|w|` decides alone, and within a layer the order is that of magnitude. The
    report has the Spearman rank correlation of each layer's score with |w|, and warns above 0.999. `score="fisher"` is
    the control: `F_dom w^2`, the loss in the domain that a diagonal second order expects (LeCun et al., Optimal Brain
    Damage, 1989); it needs no general data.

    Scores are float64, since the term of F may be less of the sum than float32 tells apart. The sums of squares are of
    the accumulation dtype: in float32 squares of gradients below 1e-19 vanish.
    """

    scope = "model"

    class Options(Metric.Options):
        """Options of GAPrune and of its control."""

        score: Literal["dai", "fisher"] = Field("dai", description="the paper's score, or the control F_dom w^2")
        alpha: float = Field(0.2, ge=0, le=1, description="weight of the alignment s; fisher has no use for it")
        beta: float = Field(1.0, ge=0, description="weight of the general data's F; fisher has no use for it")
        gamma: float = Field(0.5, ge=0, description="weight of the root of |w|; fisher has no use for it")

    options: Options

    @property
    def requires(self) -> Sequence[type[Statistic] | On[Any]]:  # type: ignore[override]
        """Squares and sums of gradients on both sets of data; for the control, squares on the domain's."""
        if self.options.score == "fisher":
            return (GradientSquares,)
        return GradientSquares, GradientSum, On(GENERAL, GradientSquares), On(GENERAL, GradientSum)

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return the score [out, in], float64."""
        weight, domain = layer.weight.double().abs(), fisher(stats[GradientSquares])
        if self.options.score == "fisher":
            return domain * weight.square()
        general = fisher(stats[On(GENERAL, GradientSquares)])
        alignment = cosine(stats[GradientSum].total, stats[On(GENERAL, GradientSum)].total)
        matters = (domain - self.options.beta * general) * weight + self.options.gamma * weight.sqrt()
        return matters * (1 + self.options.alpha * alignment)

    def measure(self, layer: Layer, score: Tensor, stats: LayerStatistics) -> Mapping[str, float]:
        """Return the Spearman rank correlation of the score with |w|, of at most 100,000 weights drawn by a fixed seed.

        Nothing where all scores or all weights of a layer are equal.
        """
        score, weight = score.flatten(), layer.weight.abs().flatten()
        if len(score) > RANKED:
            drawn = torch.randint(len(score), (RANKED,), generator=torch.Generator().manual_seed(0)).to(score.device)
            score, weight = score[drawn], weight[drawn]
        ranks = torch.stack([ranks_of(score), ranks_of(weight)])
        found = float(torch.corrcoef(ranks)[0, 1])
        return {} if found != found else {"spearman": found}  # NaN where one of them does not vary

    def remarks(self, measured: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
        """Return the range of the rank correlations, and whether any layer is ordered as by magnitude."""
        found = {name: of_layer["spearman"] for name, of_layer in measured.items()}
        least, most = min(found.values()), max(found.values())
        span = f"{least:.4f} to {most:.4f} over {len(found)} layers"
        lines = [f"Spearman rank correlation of the score with |w|: {span}"]
        alike = [name for name, each in found.items() if each > SAME_ORDER]
        if alike:
            lines.append(
                f"the score orders the weights of {len(alike)} of {len(found)} layers as magnitude does (Spearman "
                f"above {SAME_ORDER}), such as {alike[0]}; gradients have next to no say there"
            )
        return lines


def fisher(squares: GradientSquares) -> Tensor:
    """Return the mean over samples of the squared gradient [out, in], float64."""
    return squares.total.double() / squares.samples


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of two gradients [out, in], float64, a scalar; 0 if one of them is zero."""
    first, second = first.double(), second.double()
    norms = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    return torch.where(norms > 0, (first * second).sum() / norms, 0.0)


def ranks_of(values: Tensor) -> Tensor:
    """Return the rank of each value [values], float64; equal values have the mean of their ranks."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[places]
