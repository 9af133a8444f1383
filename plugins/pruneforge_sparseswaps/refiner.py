"""SparseSwaps (Zimmer et al., SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale, 2025)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, Gram, Layer, LayerStatistics, Pattern, Pruned, Refiner

VALUES = 1 << 24
"""Weights, or swaps of them, that are compared at a time, which bounds the memory."""

SWAPS = 8
"""Most swaps of a row in a round. More leave less of the best to choose from, and fewer compare all weights oftener."""


class SparseSwaps(Refiner):
    """Swap a pruned weight for a kept one of its row while that lowers the layer's error.

    With `G = X^T X` and c = G (w * (1 - m)) for a row w with mask m, pruning u and keeping p instead changes the error
    by `-2 w_p c_p + w_p^2 G_pp + 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu`. With N:M, both weights are of one group.

    A round computes every row's c and chooses weights to compare: of an N:M pattern the `candidates` groups with the
    best swaps, of others the `candidates` weights of each side that change the error least for themselves. Among these
    the change of every swap is exact. The best one is taken, the changes of the others are corrected for it, and so on
    for up to 8 swaps, each weight once. A row goes on as long as its error, computed anew, is lower than a round ago
    and else keeps the mask of that time, so it ends where no swap that is compared lowers it, and never with a higher
    error.
    """

    requires = (Gram,)
    masks_only = True

    class Options(Refiner.Options):
        """Options of SparseSwaps."""

        steps: int = Field(100, ge=1, description="most swaps of a row")
        candidates: int = Field(32, ge=1, description="weights of either side, or groups of N:M, compared in a row")

    options: Options

    def refine(self, layer: Layer, stats: LayerStatistics, pruned: Pruned, pattern: Pattern) -> Pruned:
        """Return a mask [out, in] of the same counts and a lower error; weights are the layer's own."""
        gram, weight, mask = stats[Gram].total, layer.weight, pruned.mask.clone()
        if pattern.sparsity == 0:
            return Pruned(mask)
        columns = weight.shape[1]
        swaps = pattern.n * (pattern.m - pattern.n) * columns // pattern.m if isinstance(pattern, NM) else 0
        rows = max(1, VALUES // max(4 * columns, swaps, self.options.candidates**2))
        for part, keep in zip(weight.split(rows), mask.split(rows), strict=True):
            self._refine(part, keep, gram, pattern)
        return Pruned(mask)

    def _refine(self, weight: Tensor, mask: Tensor, gram: Tensor, pattern: Pattern) -> None:
        """Swap within rows of `mask` [rows, in], in place, until no round lowers a row's error."""
        active = torch.arange(len(weight), device=weight.device)
        least = torch.full_like(active, torch.inf, dtype=weight.dtype)
        left = torch.full_like(active, self.options.steps)
        w, keep = weight, mask.clone()
        while len(active):
            removed = w * ~keep
            correlation = removed @ gram
            error = (removed * correlation).sum(1)
            lower = error < (1 - 1e-6) * least  # more than what rounding makes of it
            active, least, left, w, keep = active[lower], error[lower], left[lower], w[lower], keep[lower]
            mask[active] = keep
            square, twice = w.square() * gram.diagonal(), 2 * w * correlation[lower]
            p, u = _candidates(keep, square - twice, square + twice, pattern, self.options.candidates)
            change = _changes(w, square - twice, square + twice, gram, p, u)
            change = torch.where(_at(keep, p)[..., :, None] | ~_at(keep, u)[..., None, :], torch.inf, change)
            if change.shape[1] > self.options.candidates:  # groups
                best = change.amin((2, 3)).topk(self.options.candidates, largest=False).indices[..., None]
                p, u = p.take_along_dim(best, 1), u.take_along_dim(best, 1)
                change = change.take_along_dim(best[..., None], 1)
            left -= _swap(w, keep, change, gram, p, u, left)


def _candidates(keep: Tensor, regain: Tensor, loss: Tensor, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
    """Return the columns of pruned weights p [rows, groups, P] and kept ones u [rows, groups, U] to compare.

    Without groups, there is one, of the least `regain` of keeping and `loss` of pruning. A row that has fewer weights
    of a side than are compared lists some of the other side.
    """
    if isinstance(pattern, NM):
        shape = (len(keep), keep.shape[1] // pattern.m)
        p, u = (~keep).nonzero()[:, 1], keep.nonzero()[:, 1]
        return p.view(*shape, pattern.m - pattern.n), u.view(*shape, pattern.n)
    count = min(count, keep.shape[1])
    p = torch.where(keep, torch.inf, regain).topk(count, largest=False).indices
    u = torch.where(keep, loss, torch.inf).topk(count, largest=False).indices
    return p[:, None], u[:, None]


def _changes(w: Tensor, regain: Tensor, loss: Tensor, gram: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """Return what each swap adds to its row's error, [rows, groups, P, U]."""
    change = gram.take(p[..., :, None] * len(gram) + u[..., None, :])
    change *= _at(-2 * w, p)[..., :, None]
    change *= _at(w, u)[..., None, :]
    change += _at(regain, p)[..., :, None]
    change += _at(loss, u)[..., None, :]
    return change


def _swap(w: Tensor, keep: Tensor, change: Tensor, gram: Tensor, p: Tensor, u: Tensor, left: Tensor) -> Tensor:
    """Swap in `keep` [rows, in], in place, the best of `change`, which is corrected; return the swaps of each row.

    After a swap (p, u), c has moved by d = w_u G_u - w_p G_p, and so each regain by -2 w d and each loss by 2 w d.
    """
    (_, groups, pruned, remaining), columns = change.shape, len(gram)
    places = torch.cat([p.flatten(1), u.flatten(1)], 1)
    split = groups * pruned
    twice = 2 * w.gather(1, places)
    twice[:, :split] *= -1
    done = torch.zeros_like(left)
    for _ in range(SWAPS):
        least, at = change.flatten(1).min(1, keepdim=True)
        lower = (least < 0) & (done < left)[:, None]
        if not lower.any():
            break
        group, pair = at // (pruned * remaining), at % (pruned * remaining)
        kept = places.gather(1, group * pruned + pair // remaining)
        gone = places.gather(1, split + group * remaining + pair % remaining)
        keep.scatter_(1, kept, keep.gather(1, kept) | lower)
        keep.scatter_(1, gone, keep.gather(1, gone) & ~lower)
        done += lower[:, 0]
        moved = gram.take(gone * columns + places) * w.gather(1, gone)
        moved -= gram.take(kept * columns + places) * w.gather(1, kept)
        moved = torch.where((places == kept) | (places == gone), torch.inf, moved.mul_(twice))  # swapped once
        change += moved[:, :split].view_as(p)[..., :, None]
        change += moved[:, split:].view_as(u)[..., None, :]
    return done


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Return the values [rows, in] at columns [rows, groups, n]."""
    return values.gather(1, places.flatten(1)).view_as(places)
