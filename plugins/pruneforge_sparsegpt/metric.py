"""SparseGPT (Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, Gram, Layer, LayerStatistics, Metric, Options, Pattern, Pruned, PruneForgeError, Unstructured

Choice = Pattern | Tensor
"""What decides which weights are pruned: a pattern, by their scores, or a mask that is given."""

PruneColumns = Callable[[Tensor, Tensor, Choice], tuple[Tensor, Tensor]]

SUB_BLOCK = 32
"""Number of columns whose errors go to the rest of the block together, as one matrix product."""

HIGHEST_DAMPING = 1.0
"""Largest damping to try, as a multiple of the mean of the Hessian's diagonal."""


class SparseGPT(Metric):
    """Prune column by column and let the columns to the right make up for it (algorithm 1).

    With H = 2/N X^T X and U the upper Cholesky factor of its damped inverse (H^-1 = U^T U), a weight's score is
    `W^2 / diag(U)^2`. Pruning column j makes an error `e_j = (w_j - q_j) / U_jj`, which changes the later columns by
    `-e_j U_j,j+1:`. Unstructured masks are selected over all rows of a block of columns, N:M masks for every M columns,
    both on the weights as compensated so far.
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
        """Return the mask and the compensated weight of a layer, both [out, in].

        Raises:
            PruneForgeError: The Hessian cannot be factorised.
        """
        return self.compensate(layer, stats, pattern)

    def compensate(self, layer: Layer, stats: LayerStatistics, choice: Choice) -> Pruned:
        """Return the mask and the compensated weight of a layer, both [out, in].

        Args:
            layer: The layer, dense.
            stats: Its statistics, as this metric owns them.
            choice: A pattern, or the mask, boolean [out, in].

        Raises:
            PruneForgeError: The Hessian cannot be factorised.
        """
        given = choice.T if isinstance(choice, Tensor) else None
        # Like an unstructured mask, one that is given has no groups in which it is selected on the way.
        pattern = Unstructured(0.0, "layer") if isinstance(choice, Tensor) else choice
        factor, dead, notes = stats.shared("factor", lambda: self._factor(stats[Gram], layer.name))
        weight = layer.weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: a column is contiguous
        weight[dead] = 0  # a dead input contributes nothing to the output; at score 0 its weights are pruned first
        mask = torch.empty_like(weight, dtype=torch.bool)
        size = self._block_size(pattern)
        prune, slower = column_pruner(weight.device, weight.dtype, size, pattern)
        for start in range(0, len(weight), size):
            columns = slice(start, min(start + size, len(weight)))
            of_block = pattern if given is None else given[columns]
            errors, mask[columns] = prune(weight[columns], factor[columns, columns], of_block)
            # The columns to the right receive the errors of the whole block, as one matrix product (lazy updates).
            weight[columns.stop :].addmm_(factor[columns, columns.stop :].T, errors, alpha=-1)
        return Pruned(mask.T.contiguous(), weight.T.contiguous(), (*notes, *slower))

    def _block_size(self, pattern: Pattern) -> int:
        """Return the number of columns in a block: the option, rounded to whole groups of an N:M pattern."""
        size = self.options.block_size
        return max(size - size % pattern.m, pattern.m) if isinstance(pattern, NM) else size

    def _factor(self, gram: Gram, name: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return U [in, in], which columns are dead, boolean [in], and notes for the report.

        Dead columns had only zero inputs. Their diagonal entry is set to 1, as in the authors' code, so that the
        Hessian can be factorised.

        Raises:
            PruneForgeError: Even with the largest damping the Hessian cannot be factorised.
        """
        diagonal = gram.per_sample().diagonal() * self.HESSIAN_SCALE
        dead = diagonal == 0
        mean = torch.where(dead, 1, diagonal).mean()
        damping = self.options.damping
        while damping <= max(HIGHEST_DAMPING, self.options.damping):
            # In place where possible: each matrix of the Gram matrix's size takes as much memory as the statistic.
            hessian = gram.per_sample().mul_(self.HESSIAN_SCALE)
            hessian.diagonal()[dead] = 1
            hessian.diagonal().add_(damping * mean)
            factor = inverse_factor(hessian)
            if factor is not None:
                notes = (f"damping raised to {damping:g} to factorise the Hessian",)
                return factor, dead, notes if damping > self.options.damping else ()
            damping *= 10
        raise PruneForgeError(
            f"the Hessian of layer {name!r} cannot be factorised even with damping {damping / 10:g}; "
            "use more calibration samples, or `dtype` float64"
        )


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper triangular U [n, n] with matrix^-1 = U^T U, or `None` if the matrix is not positive definite.

    With J the reversal of rows and columns and J A J = L L^T, A = (J L J) (J L J)^T, so U = (J L J)^-1 = J L^-1 J. That
    is one factorisation and one triangular solve, instead of an inverse and two factorisations.

    Args:
        matrix: A [n, n]; it is overwritten.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed.item():
        return None
    identity = matrix.zero_()
    identity.diagonal().fill_(1)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower
    factor = inverse.flip(0, 1)
    return factor if factor.isfinite().all() else None


@cache
def column_pruner(
    device: torch.device, dtype: torch.dtype, size: int, pattern: Pattern
) -> tuple[PruneColumns, tuple[str, ...]]:
    """Return the function that prunes blocks of `size` columns on `device`, and a note if it is a slower fallback.

    On CUDA this is the Triton kernel if a trial of it runs: Triton compiles at the first call, which needs a C
    compiler, Python's headers and a GPU that it supports. Otherwise, and on the CPU, it is `prune_columns`.
    """
    if device.type == "cpu":
        return prune_columns, ()
    slower = "columns are pruned in plain torch, at a lower speed"
    try:
        from pruneforge_sparsegpt import kernel

        if size > kernel.WIDEST[dtype]:
            return prune_columns, (f"blocks are wider than {kernel.WIDEST[dtype]} columns, so {slower}",)
        trial = torch.ones(size, kernel.TILE, dtype=dtype, device=device)
        kernel.prune_columns(trial, torch.eye(size, dtype=dtype, device=device), pattern)
    except torch.OutOfMemoryError:  # not a missing compiler, and a fallback would be cached
        raise
    except Exception as error:  # compilers and drivers raise many kinds of errors
        reason = " ".join(str(error).split())[-160:] or "no reason given"
        return prune_columns, (f"Triton cannot run here ({type(error).__name__}: {reason}), so {slower}",)
    return kernel.prune_columns, ()


def prune_columns(weight: Tensor, factor: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place, transposed so that a column is contiguous.

    A column's error is applied to the rest of its sub-block at once, and to the rest of the block together with the
    errors of the whole sub-block, as one matrix product.

    Args:
        weight: W^T of the block [columns, out]; replaced by the pruned and compensated weight.
        factor: U of these columns [columns, columns].
        choice: A pattern, which selects the mask, or the mask, boolean [columns, out].

    Returns:
        The errors [columns, out], for the columns to the right, and the mask, boolean [columns, out].
    """
    diagonal = factor.diagonal()[:, None]
    errors = torch.empty_like(weight)
    mask = torch.empty_like(weight, dtype=torch.bool)
    divisors = torch.empty_like(weight)  # infinite where a weight is kept, so that its error is 0
    group, width = len(weight), SUB_BLOCK
    if isinstance(choice, NM):
        group = choice.m
        width = max(group, width - width % group)
    # A column takes a few microseconds, most of them for the calls: the rows are indexed once, and each column takes
    # two calls.
    columns = list(zip(weight, divisors, errors, factor, strict=True))
    for start in range(0, len(weight), width):
        stop = min(start + width, len(weight))
        for j in range(start, stop):
            if j % group == 0:
                chosen = slice(j, j + group)
                mask[chosen] = _mask(weight[chosen], diagonal[chosen], choice)
                torch.div(diagonal[chosen], ~mask[chosen], out=divisors[chosen])
            column, divisor, error, row = columns[j]
            torch.div(column, divisor, out=error)
            weight[j + 1 : stop].addr_(row[j + 1 : stop], error, alpha=-1)
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    weight.mul_(mask)
    return errors, mask


def _mask(weight: Tensor, diagonal: Tensor, choice: Choice) -> Tensor:
    """Return the mask of some columns [columns, out], as given or by the score `W^2 / diag(U)^2`."""
    if isinstance(choice, Tensor):
        return choice
    # Outside of N:M groups, all rows of a block are compared with each other.
    pattern = choice if isinstance(choice, NM) else choice.within("layer")
    return pattern.select((weight / diagonal).square_().T).T
