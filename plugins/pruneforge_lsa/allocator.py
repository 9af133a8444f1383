"""LSA (Yang et al., LSA: Layer-wise Sparsity Allocation for Large Language Model Pruning ..., ICLR 2026)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Allocator, Block, Gram, Layer, LayerStatistics, spread

ROWS = 1024
"""Rows that are pruned together, which bounds the memory of the errors compared."""


class LSA(Allocator):
    """Sparsity follows the error that is left of each block, or layer, when half of its weights are removed.

    E_l is the least `||X (W - W')||^2` found by removing half of the weights of each row w one after another, always
    the one that raises the error least: removing i adds e_i, which begins at `w_i^2 H_ii` with `H = X^T X`, and each
    removal of j adds `2 w_i w_j H_ij` to e_i. The importance is `I_l = 1 - E_l / sum E`; sparsity falls linearly with
    it, over a range of `[sparsity - b, sparsity + b]` that is shifted to the mean. The sum thus cancels.

    The paper's code was not at hand: that rows are pruned apart, that a block's E is the sum of its layers', the linear
    map and the default of `b` are derived here. That a high error means redundancy is taken from the formula of I as
    others quote it; `redundant="low"` turns it round, which made the demo's language model worse.
    """

    requires = (Gram,)

    class Options(Allocator.Options):
        """Options of LSA."""

        b: float = Field(0.1, ge=0, le=0.5, description="half of how far the sparsities lie apart")
        per: Literal["block", "layer"] = Field("block", description="whether blocks are compared, or single layers")
        redundant: Literal["high", "low"] = Field(
            "high", description="whether blocks or layers with a high or a low error are pruned more"
        )

    options: Options

    def measure(
        self, block: Block, stats: Mapping[str, LayerStatistics], score: Callable[[Layer], Tensor]
    ) -> dict[str, Any]:
        """Return the error of each layer of the block."""
        return {layer.name: half_removed(layer.weight, stats[layer.name][Gram].total) for layer in block.layers}

    def allocate(
        self, measures: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer."""
        groups = {
            name: block if self.options.per == "block" else name for block, found in measures.items() for name in found
        }
        errors = dict.fromkeys(groups.values(), 0.0)
        for found in measures.values():
            for name, error in found.items():
                errors[groups[name]] += error if self.options.redundant == "high" else -error
        share = spread(errors, sparsity, self.options.b)
        names = [name for layers in sizes.values() for name in layers]
        return {name: share[groups[name]] if name in groups else sparsity for name in names}


def half_removed(weight: Tensor, gram: Tensor) -> float:
    """Return the error of a weight [out, in] without half of each row, rounded down, by greedy removal.

    Args:
        weight: [out, in].
        gram: H [in, in].
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rows in weight.split(ROWS):
        rise = rows.square() * gram.diagonal()
        for _ in range(weight.shape[1] // 2):
            least, place = rise.min(1, keepdim=True)
            total += least.sum(dtype=torch.float64)
            rise += gram[place[:, 0]].mul_(rows).mul_(2 * rows.gather(1, place))
            rise.scatter_(1, place, torch.inf)
    return total.item()
