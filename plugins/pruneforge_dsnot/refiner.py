"""DSnoT (Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, 2024)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, ColumnMoments, ColumnSquares, Layer, LayerStatistics, Pattern, Pruned, Refiner


class DSnoT(Refiner):
    """Swap a pruned weight for a kept one of its row while that brings the row's mean error nearer to zero.

    With D = W * mean_j, where mean_j is the sum over tokens of input j, signed, divided by the number of samples, the
    error of a row is the sum of D over its pruned weights. If it is positive, a swap regrows the pruned weight of the
    largest D_j / Var(x_j) and prunes the kept one with D < 0 of the least Wanda score, |W| times the norm of its input;
    if it is negative, the one of the smallest D_j / Var(x_j) and the kept one with D > 0 of the least score. With N:M
    the one that is pruned is that of the least score in the group of the regrown, whatever its D. Each weight is
    swapped once.

    A row is done when its error is within `threshold`, after `cycles`, or without a weight of the sign it needs. The
    threshold is absolute: what it means depends on the length of the samples. With `same_sign` and with N:M, a row is
    also done before a swap that turns the sign of its error, as in the paper; the authors' code has the rule, but off.
    Their code leaves the layers of MLPs as they were, by default; here all layers are refined.

    It does not minimise the layer's squared error, which may rise.

    Not in the paper: a row whose mean error would end further from zero than it started, since a swap went too far,
    keeps its mask, and one without a weight of the sign it needs ends.
    """

    requires = (ColumnMoments, ColumnSquares)
    masks_only = True

    class Options(Refiner.Options):
        """Options of DSnoT."""

        cycles: int = Field(50, ge=1, description="most swaps of a row")
        threshold: float = Field(
            0.1, ge=0, description="mean error, summed over a sample's tokens, that a row may have"
        )
        same_sign: bool = Field(
            False, description="whether a row ends before its error turns its sign; N:M always does"
        )

    options: Options

    def refine(self, layer: Layer, stats: LayerStatistics, pruned: Pruned, pattern: Pattern) -> Pruned:
        """Return a mask [out, in] of the same counts in each row, or group; weights are the layer's own."""
        moments, squares = stats[ColumnMoments], stats[ColumnSquares]
        mean = layer.weight * (moments.mean() * moments.tokens / moments.samples)  # D
        score = layer.weight.abs() * squares.per_sample().sqrt()
        mask, error = self._swap(mean, moments.variance(), score, pruned.mask, pattern)
        start = (mean * ~pruned.mask).sum(1)
        return Pruned(torch.where((error.abs() > start.abs())[:, None], pruned.mask, mask))

    def _swap(
        self, mean: Tensor, variance: Tensor, score: Tensor, mask: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Return the mask [out, in] after all swaps, and the error of each row [out]."""
        count = min(self.options.cycles, mask.shape[1])
        # Of a negative error and of a positive one [2, out, count]: what to regrow and what to prune, the first first.
        urgency = mean.abs() / variance
        pruned_of = torch.stack([~mask & (mean < 0), ~mask & (mean > 0)])
        kept_of = torch.stack([mask & (mean > 0), mask & (mean < 0)])
        regrown = torch.where(pruned_of, urgency, -1).topk(count)
        given_up = torch.where(kept_of, score, torch.inf).topk(count, largest=False)
        score = torch.where(mask, score, torch.inf)
        mask, error, rows = mask.clone(), (mean * ~mask).sum(1), torch.arange(len(mask), device=mask.device)
        active, used = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows).repeat(2, 1)
        for _ in range(self.options.cycles):
            side = (error > 0).long()
            at = (side, rows, used[side, rows])
            p, there = regrown.indices[at], regrown.values[at] >= 0
            if isinstance(pattern, NM):
                members = (p // pattern.m * pattern.m)[:, None] + torch.arange(pattern.m, device=p.device)
                least, place = score.gather(1, members).min(1)
                # Without a kept weight that was not swapped yet, the regrown one is given up at once.
                u = torch.where(least < torch.inf, members[rows, place], p)
            else:
                u = given_up.indices[at]
                there &= given_up.values[at] < torch.inf
            after = error + mean[rows, u] - mean[rows, p]
            active &= there & (error.abs() > self.options.threshold)
            if self.options.same_sign or isinstance(pattern, NM):
                active &= after.sign() == error.sign()
            if not active.any():
                break
            mask[rows, p] |= active
            mask[rows, u] &= ~active
            score[rows, u] = torch.where(active, torch.inf, score[rows, u])
            error = torch.where(active, after, error)
            used[side, rows] += active
        return mask, error
