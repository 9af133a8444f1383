"""Sparsity patterns: which weights are compared with each other, and how many of them are kept.

A mask is boolean, `True` keeps. Exactly as many weights are pruned as the pattern says.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.selection import count_kept, prune_smallest, prune_smallest_of_all

Scope = Literal["row", "layer", "block", "model"]


DEFAULT_SPARSITY = 0.5
"""The share of weights to prune if nothing is said."""


def pruned_count(total: int, sparsity: float) -> int:
    """Return how many of `total` weights a sparsity prunes: the floor of the exact decimal product.

    >>> pruned_count(100, 0.29)
    29
    """
    # Binary floating point gives 100 * 0.29 = 28.999...; the fraction of the decimal text is exact.
    return int(total * Fraction(repr(float(sparsity))))


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights of each comparison group.

    Attributes:
        sparsity: The share to prune, in [0, 1).
        scope: The comparison group: an output row, a layer, a block or the model.
    """

    sparsity: float
    scope: Scope = "row"

    def check(self, layer: str, in_features: int) -> None:
        """Do nothing: any layer can be pruned to any sparsity."""

    def steps(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many steps a layer [out, in] can be pruned by, and the weights of one: one, or one a row."""
        out_features, in_features = shape
        return (in_features, out_features) if self.scope == "row" else (out_features * in_features, 1)

    def at(self, steps: int, shape: tuple[int, int]) -> Unstructured:
        """Return the pattern that prunes a layer [out, in] by so many steps."""
        most, _ = self.steps(shape)
        share = steps / most
        # A share that is rounded down would prune one step less.
        return replace(self, sparsity=share if pruned_count(most, share) == steps else math.nextafter(share, 1))

    def within(self, scope: Scope) -> Unstructured:
        """Return a pattern of the same sparsity with another comparison group."""
        return replace(self, scope=scope)

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask, boolean [out, in], of scores [out, in]: row by row, or the whole matrix as one group."""
        if self.scope == "row":
            return prune_smallest(scores, pruned_count(scores.shape[1], self.sparsity))
        return prune_smallest_of_all(scores, pruned_count(scores.numel(), self.sparsity))

    def fits(self, mask: Tensor) -> bool:
        """Return whether a mask [out, in] prunes exactly the right number of weights of each row or of the layer."""
        rows = mask if self.scope == "row" else mask.reshape(1, -1)
        return bool((count_kept(rows) == rows.shape[1] - pruned_count(rows.shape[1], self.sparsity)).all())

    def __str__(self) -> str:
        return repr(float(self.sparsity))


@dataclass(frozen=True)
class NM:
    """Keeps `n` of every `m` consecutive weights of an output row.

    Attributes:
        n: Number of weights kept in a group.
        m: Size of a group along the inputs.
    """

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """The share pruned, 1 - n/m."""
        return (self.m - self.n) / self.m  # 1 - n / m rounds twice, which may lose a step of an allocation

    def check(self, layer: str, in_features: int) -> None:
        """Raise unless `in_features` is a multiple of m.

        Raises:
            PruneForgeError: Naming the layer.
        """
        if in_features % self.m:
            raise PruneForgeError(
                f"pattern {self} needs inputs in groups of {self.m}, and layer {layer!r} has {in_features} of them; "
                f"leave it out with `exclude` '*{layer.rpartition('.')[2]}'"
            )

    def steps(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many steps a layer [out, in] can be pruned by, and the weights of one: one of each group."""
        return self.m - 1, shape[0] * shape[1] // self.m

    def at(self, steps: int, shape: tuple[int, int]) -> NM:
        """Return the pattern that prunes a layer [out, in] by so many steps."""
        return replace(self, n=self.m - steps)

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask, boolean [out, in], of scores [out, in]; `in` must be a multiple of m."""
        groups = scores.reshape(-1, self.m)
        if self.m > 8:
            return prune_smallest(groups, self.m - self.n).view_as(scores)
        # A weight's rank is the number of weights of its group that are pruned before it. Comparing all pairs takes
        # m^2 / 2 cheap passes over the scores.
        columns = groups.T.contiguous()
        rank = torch.zeros_like(columns, dtype=torch.uint8)
        for later in range(1, self.m):
            for earlier in range(later):
                first = columns[earlier] <= columns[later]
                rank[later] += first
                rank[earlier] += ~first
        return (rank >= self.m - self.n).T.reshape(scores.shape)

    def fits(self, mask: Tensor) -> bool:
        """Return whether a mask [out, in] keeps exactly n of every group."""
        places = mask.view(torch.uint8).reshape(-1, self.m).T
        kept = places[0].to(torch.int32)
        for place in places[1:]:
            kept += place
        return bool((kept == self.n).all())

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def parse_pattern(sparsity: float | None, pattern: str | None, scope: Scope) -> Pattern:
    """Return the pattern that a user asked for.

    Args:
        sparsity: Share to prune; by default 0.5, or the pattern's own.
        pattern: `None`, "unstructured", or "N:M" to keep N of every M weights.
        scope: Comparison group of an unstructured pattern.

    Raises:
        PruneForgeError: The sparsity is outside [0, 1), the pattern is invalid, or the two disagree.
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise PruneForgeError(f"sparsity {sparsity} is outside [0, 1); it is the share of weights to prune")
    if pattern is None or pattern == "unstructured":
        return Unstructured(DEFAULT_SPARSITY if sparsity is None else sparsity, scope)
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", pattern)
    if not match:
        raise PruneForgeError(f"pattern {pattern!r} is neither 'unstructured' nor N:M, such as 2:4")
    n, m = int(match[1]), int(match[2])
    if not 0 < n <= m:
        raise PruneForgeError(f"pattern {pattern!r} keeps {n} of every {m}; N must lie between 1 and M")
    parsed = NM(n, m)
    if sparsity is not None and abs(sparsity - parsed.sparsity) > 1e-9:
        raise PruneForgeError(
            f"sparsity {sparsity} contradicts pattern {pattern}, which prunes {parsed.sparsity:g}; leave out one"
        )
    return parsed
