"""SparseFW (Roux et al., Don't Be Greedy, Just Relax! Pruning LLMs via Frank-Wolfe, 2025)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, Gram, Layer, LayerStatistics, Pattern, Pruned, Refiner, Unstructured


class SparseFW(Refiner):
    """Minimise the layer's error over relaxed masks with the algorithm of Frank and Wolfe, and round the result.

    With `G = X^T X`, the error `||X (W - M * W)^T||^2` of M in [0, 1] with the pattern's sums has the gradient
    `-2 W * ((W - M * W) G)`. Step t moves M by 2 / (t + 2) of the way to V, the mask of the pattern that selects by the
    negative gradient; the result is the mask that selects by the last M. The best `fixed` share of the weights that
    the metric kept, by |w_j| sqrt(G_jj), stays kept all the time: of each row, or of the layer if that is compared.

    A relaxed mask of a lower error may round to one of a higher. Not in the paper: each row keeps the better of its two
    masks, and with a pattern over the whole layer the layer does, so the layer's error never rises. The length of the
    steps is the algorithm's own, and their number is chosen here.
    """

    requires = (Gram,)
    masks_only = True

    class Options(Refiner.Options):
        """Options of SparseFW."""

        steps: int = Field(100, ge=1, description="steps of the algorithm; each takes a product with the Gram matrix")
        fixed: float = Field(0.9, ge=0, le=1, description="share of the kept weights that stay kept")

    options: Options

    def refine(self, layer: Layer, stats: LayerStatistics, pruned: Pruned, pattern: Pattern) -> Pruned:
        """Return a mask [out, in] of the same pattern and no higher error; weights are the layer's own."""
        weight, gram, start = layer.weight, stats[Gram].total, pruned.mask
        fixed = self._fixed(weight.abs() * gram.diagonal().sqrt(), start, pattern)
        relaxed = start.to(weight.dtype)
        for step in range(self.options.steps):
            descent = weight * ((weight - relaxed * weight) @ gram)  # half of the negative gradient
            vertex = pattern.select(descent.masked_fill_(fixed, torch.inf))
            relaxed.lerp_(vertex.to(weight.dtype), 2 / (step + 2))
        mask = pattern.select(relaxed.masked_fill_(fixed, torch.inf))
        before, after = _errors(weight, start, gram), _errors(weight, mask, gram)
        if not isinstance(pattern, NM) and pattern.scope != "row":
            before, after = before.sum(), after.sum()
        return Pruned(torch.where((after < before)[..., None], mask, start))

    def _fixed(self, score: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
        """Return which weights stay kept, boolean [out, in]."""
        share = self.options.fixed * (1 - pattern.sparsity)
        best = Unstructured(1 - share, "row" if isinstance(pattern, NM) else pattern.scope)
        return best.select(score.masked_fill(~mask, -1)) & mask


def _errors(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Return the error of each row [out]."""
    removed = weight * ~mask
    return ((removed @ gram) * removed).sum(1)
