"""SparseSwaps (Zimmer et al., SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale, 2025)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, Gram, Layer, LayerStatistics, Pattern, Pruned, Refiner

ROWS = 256
"""Rows that are refined together, which bounds the memory of the swaps compared."""


class SparseSwaps(Refiner):
    """Swap a pruned weight for a kept one of its row while that lowers the layer's error.

    With `G = X^T X` and c = G (w * (1 - m)) for a row w with mask m, pruning u and keeping p instead changes the error
    by `-2 w_p c_p + w_p^2 G_pp + 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu`. Each step takes the best swap of every row
    among its `candidates` best of both sides; with N:M, both weights are of one group. The error never rises.
    """

    requires = (Gram,)

    class Options(Refiner.Options):
        """Options of SparseSwaps."""

        steps: int = Field(100, ge=1, description="most swaps of a row")
        candidates: int = Field(32, ge=1, description="pruned and kept weights of a row that are compared in a step")

    options: Options

    def refine(self, layer: Layer, stats: LayerStatistics, pruned: Pruned, pattern: Pattern) -> Pruned:
        """Return a mask [out, in] of the same counts and a lower error; weights are the layer's own.

        A metric's updated weights belong to its mask, so they are refined no further.
        """
        if pruned.weight is not None:
            return Pruned(pruned.mask, pruned.weight, ("the metric updates weights, so its mask was not refined",))
        gram, weight, mask = stats[Gram].total, layer.weight, pruned.mask.clone()
        group = pattern.m if isinstance(pattern, NM) else weight.shape[1]
        for rows, keep in zip(weight.split(ROWS), mask.split(ROWS), strict=True):
            _refine(rows, keep, gram, group, self.options.steps, self.options.candidates)
        return Pruned(mask)


def _refine(weight: Tensor, mask: Tensor, gram: Tensor, group: int, steps: int, candidates: int) -> None:
    """Swap within rows of `mask` [rows, in], in place, until no swap lowers a row's error."""
    correlation = (weight * ~mask) @ gram
    square = weight.square() * gram.diagonal()
    error = ((weight * ~mask) * correlation).sum(1)
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(steps):
        w, c, keep = weight[active], correlation[active], mask[active]
        regain = (square[active] - 2 * w * c).masked_fill(keep, torch.inf)  # of keeping a pruned weight
        loss = (square[active] + 2 * w * c).masked_fill(~keep, torch.inf)  # of pruning a kept one
        change, p, u = _best_swap(w, regain, loss, gram, group, candidates)
        lower = change < -1e-6 * error[active]  # more than what rounding makes of it
        active, change, p, u = active[lower], change[lower], p[lower], u[lower]
        if not len(active):
            return
        mask[active, p], mask[active, u] = True, False
        correlation[active] += weight[active, u, None] * gram[u] - weight[active, p, None] * gram[p]
        error[active] += change


def _best_swap(
    weight: Tensor, regain: Tensor, loss: Tensor, gram: Tensor, group: int, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's least change of error, and the columns p (kept from now on) and u (pruned), all [rows]."""
    rows, columns = weight.shape
    # [rows, groups, candidates of a group]: one group a row if the pattern has none.
    k = min(candidates, group)
    best_p = regain.view(rows, -1, group).topk(k, largest=False)
    best_u = loss.view(rows, -1, group).topk(k, largest=False)
    start = torch.arange(0, columns, group, device=weight.device)[None, :, None]
    p, u = (best_p.indices + start), (best_u.indices + start)
    w_p, w_u = weight.gather(1, p.flatten(1)).view_as(p), weight.gather(1, u.flatten(1)).view_as(u)
    together = 2 * w_p[..., :, None] * w_u[..., None, :] * gram[p[..., :, None], u[..., None, :]]
    change, at = (best_p.values[..., :, None] + best_u.values[..., None, :] - together).flatten(1).min(1)
    p, u = p.flatten(1), u.flatten(1)
    place, pair = at // (k * k) * k, at % (k * k)
    return change, p.gather(1, (place + pair // k)[:, None])[:, 0], u.gather(1, (place + pair % k)[:, None])[:, 0]
