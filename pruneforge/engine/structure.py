"""The structure of masks and scores: how much of their variance rows and columns explain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """Shares of the variance of a matrix [out, in].

    Over all its entries, with their mean p, the variance is `SST = sum (x - p)^2`; of a mask that keeps the share p,
    `out * in * p (1 - p)`. Rows with the means r explain `in * sum (r - p)^2` of it, columns with the means c
    `out * sum (c - p)^2`.

    Attributes:
        rows: Share that rows explain; 0 where each row of a mask keeps the same.
        columns: Share that columns explain.
        variance: SST, by which several masks are weighted.
    """

    rows: float
    columns: float
    variance: float


def structure_of(matrix: Tensor) -> Structure:
    """Return the structure of a mask or of scores [out, in]; all of it is 0 where all entries are equal."""
    values = matrix.double()
    p = values.mean()
    variance = float((values - p).square().sum())
    if not variance:
        return Structure(0.0, 0.0, 0.0)
    rows = matrix.shape[1] * (values.mean(1) - p).square().sum()
    columns = matrix.shape[0] * (values.mean(0) - p).square().sum()
    return Structure(float(rows) / variance, float(columns) / variance, variance)


def random_structure(mask: Tensor) -> Structure:
    """Return what is expected of the structure of a random mask of the same shape that keeps as many weights.

    Of a random permutation of all entries, means of rows have `(out - 1) / (out * in - 1)` of the variance.
    """
    out_features, in_features = mask.shape
    variance = structure_of(mask).variance
    if not variance:
        return Structure(0.0, 0.0, 0.0)
    others = mask.numel() - 1
    return Structure((out_features - 1) / others, (in_features - 1) / others, variance)


def together(structures: Iterable[Structure]) -> Structure:
    """Return the structure of several masks, weighted by their variance."""
    every = list(structures)
    total = sum(each.variance for each in every)
    if not total:
        return Structure(0.0, 0.0, 0.0)
    rows = sum(each.rows * each.variance for each in every) / total
    columns = sum(each.columns * each.variance for each in every) / total
    return Structure(rows, columns, total)
