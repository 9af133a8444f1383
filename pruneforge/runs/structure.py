"""The structure of masks: how much of what a mask keeps its rows and columns explain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """Shares of a mask's variance.

    With the kept share p of a mask [out, in], the variance over all its weights is `SST = out * in * p (1 - p)`. Rows
    with the kept shares r explain `in * sum (r - p)^2` of it, columns with the kept shares c `out * sum (c - p)^2`.

    Attributes:
        rows: Share that rows explain; 0 where each row keeps the same.
        columns: Share that columns explain.
        variance: SST, by which several masks are weighted.
    """

    rows: float
    columns: float
    variance: float


def structure_of(mask: Tensor) -> Structure:
    """Return the structure of a mask, boolean [out, in]; all of it is 0 where everything or nothing is kept."""
    kept = mask.double()
    p = kept.mean()
    variance = float(mask.numel() * p * (1 - p))
    if not variance:
        return Structure(0.0, 0.0, 0.0)
    rows = mask.shape[1] * (kept.mean(1) - p).square().sum()
    columns = mask.shape[0] * (kept.mean(0) - p).square().sum()
    return Structure(float(rows) / variance, float(columns) / variance, variance)


def random_structure(mask: Tensor, seed: int = 0) -> Structure:
    """Return the structure of a random mask of the same shape that keeps as many weights, for comparison."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(mask.numel(), generator=generator)
    return structure_of(mask.flatten()[order].view(mask.shape))


def together(structures: Iterable[Structure]) -> Structure:
    """Return the structure of several masks, weighted by their variance."""
    every = list(structures)
    total = sum(each.variance for each in every)
    if not total:
        return Structure(0.0, 0.0, 0.0)
    rows = sum(each.rows * each.variance for each in every) / total
    columns = sum(each.columns * each.variance for each in every) / total
    return Structure(rows, columns, total)
