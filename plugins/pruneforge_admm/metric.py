"""ADMM (Boza, Fast and Effective Weight Update for Pruned Large Language Models, 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, Gram, Layer, LayerStatistics, Metric, Pattern, Pruned, Unstructured


class ADMM(Metric):
    """Minimise the layer's error over the weights, and project onto the pattern, in turns that come to agree.

    With d_j = ||X_j||_2 + 1e-8, A the correlations of the inputs, `X^T X / (d d^T)` plus `damping` times its diagonal's
    mean, B_0 = W d and P = (A + I)^-1, an iteration takes Z, the projection of B + U, adds B - Z to U, and sets B to
    P (A B_0 + Z - U) = B_0 + P (Z - U - B_0). The result is the projection of the last B + U, divided by d.

    The first `ramp` iterations select the support by |B + U|, by default over the whole layer. Its sparsity rises with
    the cube of what is left of the way, as in the paper; in whole layers the authors' code selects at the full sparsity
    from the beginning, which is the schedule `constant`. On the way, an N:M support also keeps the largest of the
    weights outside of it.
    """

    requires = (Gram,)
    scope = "layer"

    class Options(Metric.Options):
        """Options of ADMM."""

        iterations: int = Field(20, ge=1, description="updates of the weights")
        ramp: int = Field(15, ge=1, description="iterations that select the support, or all; it then stays")
        schedule: Literal["cubic", "constant"] = Field("cubic", description="how sparsity rises to its full value")
        damping: float = Field(0.1, ge=0, description="added to the correlations' diagonal, times the diagonal's mean")

    options: Options

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Return the mask and the updated weight of a layer, both [out, in]."""
        norm, inverse = stats.shared("inverse", lambda: self._inverse(stats[Gram]))
        total = dense = (layer.weight * norm).contiguous()  # B + U, and B_0; transposed, as everything here is
        for step in range(self.options.iterations):
            if step < self.options.ramp:
                mask = self._support(total.abs(), pattern, (step + 1) / min(self.options.ramp, self.options.iterations))
            # Z - U is B + U on the support and -(B + U) elsewhere, since there either U or Z is 0.
            total = torch.addmm(dense, torch.where(mask, total, -total).sub_(dense), inverse).addcmul_(total, ~mask)
        return Pruned(mask, total.mul_(mask).div_(norm))

    def _inverse(self, gram: Gram) -> tuple[Tensor, Tensor]:
        """Return d [in] and P [in, in]; an input that is always zero correlates with none, and has a tiny d."""
        norm = (gram.total.diagonal() / gram.samples).sqrt() + 1e-8
        correlations = gram.per_sample().div_(norm).div_(norm[:, None])
        correlations.diagonal().add_(1 + self.options.damping * correlations.diagonal().mean())
        return norm, torch.cholesky_inverse(torch.linalg.cholesky(correlations))

    def _support(self, score: Tensor, pattern: Pattern, way: float) -> Tensor:
        """Return the mask [out, in] after a part of the way, in (0, 1], from dense to the pattern."""
        if self.options.schedule == "constant" or way == 1:
            return pattern.select(score)
        rising = Unstructured(pattern.sparsity * (1 - (1 - way) ** 3), getattr(pattern, "scope", "layer"))
        return rising.select(score.masked_fill_(pattern.select(score), torch.inf) if isinstance(pattern, NM) else score)
