"""SparseGPT (Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Gram, Layer, LayerStatistics, Metric, Options, Pruned, PruneForgeError
from pruneforge.patterns import NM, Pattern

HIGHEST_DAMPING = 1.0
"""Times the mean of the Hessian's diagonal; past it, the factorisation is given up."""


class SparseGPT(Metric):
    """Prune column by column and let the columns to the right make up for it (algorithm 1).

    With H = 2/N X^T X and U the upper Cholesky factor of its damped inverse (H^-1 = U^T U), a weight's
    score is `W^2 / diag(U)^2`; removing column j at error `e_j = (w_j - q_j) / U_jj` changes the later
    columns by `-e_j U_j,j+1:`. Unstructured masks are chosen for all rows of a block of columns at once,
    N:M masks every M columns, each on the weights as compensated by then.
    """

    requires = (Gram,)
    scope = None

    class Options(Options):
        """Options of SparseGPT."""

        damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, times the diagonal's mean")
        block_size: int = Field(128, ge=1, description="columns that share one mask selection")

    options: Options
    HESSIAN_SCALE: ClassVar[float] = 2.0

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Return the mask and the compensated weight of a layer [out, in]."""
        factor, dead, notes = stats.shared("factor", lambda: self._factor(stats[Gram], layer.name))
        weight = layer.weight.clone()
        weight[:, dead] = 0
        mask = torch.ones_like(weight, dtype=torch.bool)
        size = self._block_size(pattern)
        for start in range(0, weight.shape[1], size):
            columns = slice(start, min(start + size, weight.shape[1]))
            block, block_factor = weight[:, columns], factor[columns, columns]
            errors, mask[:, columns] = _prune_columns(block, block_factor, pattern)
            weight[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        return Pruned(mask, weight, notes)

    def _block_size(self, pattern: Pattern) -> int:
        """Columns a block: the option, rounded to whole groups of an N:M pattern."""
        size = self.options.block_size
        return max(size - size % pattern.m, pattern.m) if isinstance(pattern, NM) else size

    def _factor(self, gram: Gram, name: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return U [in, in], which columns are dead [in], and what had to be done to get there."""
        hessian = gram.per_sample() * self.HESSIAN_SCALE
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        mean = hessian.diagonal().mean()
        damping = self.options.damping
        while damping <= max(HIGHEST_DAMPING, self.options.damping):
            damped = hessian.clone()
            damped.diagonal().add_(damping * mean)
            factor = inverse_factor(damped)
            if factor is not None:
                raised = damping > self.options.damping
                return (
                    factor,
                    dead,
                    (f"damping raised to {damping:g} to factorise the Hessian",) if raised else (),
                )
            damping *= 10
        raise PruneForgeError(
            f"the Hessian of layer {name!r} cannot be factorised even with damping {damping / 10:g}; "
            "use more calibration samples, or --dtype float64"
        )


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper triangular U with matrix^-1 = U^T U [n, n], or `None` if it is not positive definite.

    With J the reversal of rows and columns and J A J = L L^T, the upper triangular R = J L J gives
    A = R R^T, so U = R^-1: one factorisation and one triangular solve.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed.item():
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor if torch.isfinite(factor).all() else None


def _prune_columns(weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place.

    Args:
        weight: [out, columns], replaced by what stays, compensated.
        factor: U of these columns [columns, columns].
        pattern: Selects the mask.

    Returns:
        The errors [out, columns] for the columns to the right, and the mask [out, columns].
    """
    diagonal = factor.diagonal()
    errors = torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    group = weight.shape[1]
    if isinstance(pattern, NM):
        group = pattern.m
    else:
        pattern = pattern.within("layer")
    for j in range(weight.shape[1]):
        if j % group == 0:
            chosen = slice(j, j + group)
            mask[:, chosen] = pattern.select(weight[:, chosen].square() / diagonal[chosen].square())
        kept = torch.where(mask[:, j], weight[:, j], 0)
        errors[:, j] = (weight[:, j] - kept) / diagonal[j]
        weight[:, j + 1 :] -= torch.outer(errors[:, j], factor[j, j + 1 :])
        weight[:, j] = kept
    return errors, mask
