"""ALPS.

Meng, Behdin, Wang and Mazumder, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models, 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Gram, Layer, LayerStatistics, Metric, Pattern, Pruned

EVERY = 3
"""Steps between two looks at how far the support still changes."""


class ALPS(Metric):
    """Minimise the layer's error under the pattern by ADMM with a growing penalty, then solve for the weights.

    With G = X^T X plus `damping` times its diagonal's mean, d the root of its diagonal, A = G / (d d^T), B_0 = W d,
    D = top-k(B_0) and V = 0, a step takes `B = (A + rho I)^-1 (A B_0 - V + rho D)`, `D = top-k(B + V / rho)` and
    `V += rho (B - D)`, where top-k keeps the largest that the pattern lets stay. One decomposition A = Q L Q^T, in
    float64, serves every rho; the steps are as exact in float32, since rho bounds how badly they are conditioned.

    The penalty follows the authors' code. Of the k places of D, c have come or gone in three steps:

    - c > k / 10: rho grows by 1.3
    - c > k / 200: rho grows by 1.2
    - less, and rho grew before: rho grows by 1.1, or the steps end if c = 0
    - less, and rho never grew: it began too large, is divided by 5, and if c > 0 the steps begin anew
    - c < 0.0003 k after 30 steps: the steps end

    The mask is top-k(B). Conjugate gradients on that support, each row on its own, then lower the error of its weights.
    """

    requires = (Gram,)
    scope = "layer"

    class Options(Metric.Options):
        """Options of ALPS."""

        rho: float = Field(0.1, gt=0, description="the first penalty on weights outside of the support")
        damping: float = Field(0.01, ge=0, description="added to the Gram matrix's diagonal, times the diagonal's mean")
        iterations: int = Field(300, ge=1, description="most steps towards a support")
        cg_steps: int = Field(10, ge=0, description="steps of conjugate gradients on the support that was found")

    options: Options

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Return the mask and the updated weight of a layer, both [out, in]."""
        inputs = stats.shared("decomposed", lambda: _decompose(stats[Gram], self.options.damping))
        dense = (layer.weight * inputs.norm).contiguous()  # B_0; transposed, as everything here is
        found = self._split(dense, inputs, pattern)
        mask = pattern.select(found.abs())
        solved = _conjugate_gradients(dense, found.mul_(mask), mask, inputs.correlations, self.options.cg_steps)
        return Pruned(mask, solved.div_(inputs.norm))

    def _split(self, dense: Tensor, inputs: _Inputs, pattern: Pattern) -> Tensor:
        """Return the last B [out, in]."""
        rho, grown = self.options.rho, False
        inverse = inputs.inverse(rho)
        support = before = pattern.select(dense.abs())
        kept = int(support.count_nonzero())
        sparse, dual = dense * support, torch.zeros_like(dense)  # D and V
        for step in range(1, self.options.iterations + 1):
            # A B_0 - V + rho D is (A + rho I) B_0 + rho (D - B_0) - V, so that A is not needed.
            found = torch.addmm(dense, (sparse - dense).mul_(rho).sub_(dual), inverse)
            dual.add_(found, alpha=rho)  # V + rho B
            sparse = dual / rho
            support = pattern.select(sparse.abs())
            sparse.mul_(support)
            dual.sub_(sparse, alpha=rho)
            if step % EVERY:
                continue
            changed = int((support ^ before).count_nonzero())
            before = support
            if step >= 30 and changed < 0.0003 * kept:
                break
            if changed > 0.005 * kept:
                rho, grown = rho * (1.3 if changed > 0.1 * kept else 1.2), True
            elif grown and not changed:
                break
            elif grown:
                rho *= 1.1
            else:
                rho /= 5
                if changed:
                    support = before = pattern.select(dense.abs())
                    sparse, dual = dense * support, torch.zeros_like(dense)
            inverse = inputs.inverse(rho)
        return found


@dataclass(frozen=True)
class _Inputs:
    """What is derived from a layer's inputs: d [in], A and Q [in, in], and L [in]."""

    norm: Tensor
    correlations: Tensor
    vectors: Tensor
    values: Tensor

    def inverse(self, rho: float) -> Tensor:
        """Return (A + rho I)^-1 [in, in].

        For the three steps of one rho that costs no more products than Q and Q^T in turns, and in tall layers half.
        """
        return (self.vectors / (self.values + rho)) @ self.vectors.T


def _decompose(gram: Gram, damping: float) -> _Inputs:
    """Return the decomposition, made in float64 and kept in the statistic's dtype."""
    matrix = gram.per_sample().double()
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    norm = matrix.diagonal().sqrt() + 1e-8
    matrix.div_(norm).div_(norm[:, None])
    values, vectors = torch.linalg.eigh(matrix)
    return _Inputs(*(part.to(gram.total.dtype) for part in (norm, matrix, vectors, values.clamp_(min=0))))


def _conjugate_gradients(dense: Tensor, found: Tensor, mask: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """Return `found` [out, in] after some steps towards `found A = dense A` on the mask, each row on its own."""
    residual = ((dense - found) @ matrix).mul_(mask)
    square = residual.square().sum(1, keepdim=True)
    enough = 1e-8 * (dense @ matrix).square().sum(1, keepdim=True)
    direction = residual
    for _ in range(steps):
        if not (square > enough).any():
            break
        ahead = (direction @ matrix).mul_(mask)
        curvature = (direction * ahead).sum(1, keepdim=True)
        length = torch.where(curvature > 0, square / curvature, 0)
        found = found.addcmul(direction, length)
        residual = residual.addcmul(ahead, -length)
        last, square = square, residual.square().sum(1, keepdim=True)
        direction = residual.addcmul(direction, torch.where(last > 0, square / last, 0))
    return found
