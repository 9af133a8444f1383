"""Which entries of cached keys or values are pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["token", "output", "channel", "structured", "random"]

QUERIES = 32
"""Queries that the rule `output` looks back on, as in the authors' code."""


@dataclass(frozen=True)
class Pruning:
    """How keys, or values, are pruned.

    Attributes:
        sparsity: Share of the entries to prune, in [0, 1); of each group it is rounded down.
        rule: What is compared. `token`: the magnitudes of a token's entries in one head. `output`: the same, times the
            sum of the magnitudes of the latest `QUERIES` queries, for keys. `channel`: the magnitudes of a channel over
            a group of tokens. `structured`: whole channels of a group of tokens, by their norms. `random`: chance.
        tokens: Tokens that are pruned together, as soon as all of them have left the window; rules that look at one
            token prune each by itself.
    """

    sparsity: float
    rule: Rule = "token"
    tokens: int = 32

    @property
    def group(self) -> int:
        """Tokens that are pruned together."""
        return self.tokens if self.rule in ("channel", "structured") else 1

    def prune(self, states: Tensor, queries: Tensor | None = None) -> Tensor:
        """Return states with the pruned entries zero.

        Args:
            states: Keys or values [samples, heads, tokens, channels], a multiple of `group` tokens.
            queries: For the rule `output`, sums of the magnitudes of queries, as `states`, or with one token for all.
        """
        channels = states.shape[-1]
        if self.rule in ("channel", "structured"):
            parts = states.unflatten(2, (-1, self.group))  # [samples, heads, groups, tokens, channels]
            if self.rule == "structured":
                norms = parts.float().square().sum(3, keepdim=True)
                return (parts * _largest(norms, int(self.sparsity * channels), -1)).flatten(2, 3)
            return (parts * _largest(parts.abs(), int(self.sparsity * self.group), 3)).flatten(2, 3)
        scores = torch.rand_like(states.float()) if self.rule == "random" else states.abs()
        if queries is not None:
            scores = scores * queries
        return states * _largest(scores, int(self.sparsity * channels), -1)


def _largest(scores: Tensor, pruned: int, dim: int) -> Tensor:
    """Return a mask of all but the `pruned` smallest scores along a dimension."""
    smallest = scores.topk(pruned, dim, largest=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter(dim, smallest, False)


def query_sums(queries: Tensor, heads: int) -> Tensor:
    """Return the sums of the magnitudes of queries [samples, query heads, tokens, channels] that share key heads.

    Returns:
        [samples, heads, tokens, channels], float32.
    """
    return queries.float().abs().unflatten(1, (heads, -1)).sum(2)
