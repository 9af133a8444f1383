"""SparseGPT's loop over the columns of one block as a Triton kernel.

Given the mask, rows are independent of each other, and an N:M mask depends only on its own row. Each program loads a
tile of rows, takes it through all columns of the block in registers, and writes it back once.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneforge import NM, Pattern

TILE = 16
"""Rows of the layer in a program."""

WARPS = 8
"""Warps in a program. With these two values no variant spills registers in its loops, and a layer of 4096 rows gives
256 programs, which fill a large GPU."""

WIDEST = {torch.float32: 256, torch.float64: 128}
"""Largest number of columns in a block, by dtype: more values would not fit in registers."""


@triton.jit
def _quotient(dividend: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """Divide with rounding to nearest, which Triton's `/` does not guarantee for float32."""
    if dividend.dtype == tl.float32:  # noqa: SIM108 - a compile-time condition: only one branch is compiled
        result = tl.div_rn(dividend, divisor)
    else:
        result = dividend / divisor
    return result


@triton.jit
def _prune_tile(
    weight: tl.tensor,
    errors: tl.tensor,
    mask: tl.tensor,
    factor: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    n: tl.constexpr,
    m: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Prune `tile` rows of a block of columns, given as tensors [columns, rows].

    Triton compiles the annotations too, so they may use only what it knows. Divisions round to nearest, and
    multiplications are not fused with additions (see `enable_fp_fusion` below), so that every version of Triton rounds
    alike.

    Args:
        weight: W^T, replaced by the pruned and compensated weight.
        errors: Receives each column's error, 0 where the weight is kept.
        mask: int8, 1 keeps: the given mask if m is 0, otherwise ones, replaced by the selected mask.
        factor: U [columns, columns], row-major.
        rows: Number of rows of W, `out`.
        columns: Number of columns of W in this block.
        n: N of an N:M pattern.
        m: M of an N:M pattern, or 0.
        width: `columns` rounded up to a power of two, as Triton's tensors need.
        tile: Number of rows of this program.
    """
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, width)
    place = column[:, None] * rows + row[None, :]
    there = (column[:, None] < columns) & (row[None, :] < rows)
    # Out of range: weight 0, kept, and a divisor of 1, so that nothing there is pruned or becomes NaN.
    value = tl.load(weight + place, mask=there, other=0.0)
    keep = tl.load(mask + place, mask=there, other=1).to(tl.int32)
    diagonal = tl.load(factor + column * columns + column, mask=column < columns, other=1.0)
    error = tl.zeros_like(value)
    for j in range(columns):
        if m > 0:  # noqa: SIM102 - a compile-time condition: the branch is left out without groups
            if j % m == 0:
                # A new group: select its mask by W^2 / diag(U)^2, on the weights as compensated by now.
                ratio = _quotient(value, diagonal[:, None])
                score = ratio * ratio
                # Rank of a weight: the number of weights of its group that are smaller, or equal and before it.
                before = tl.zeros([width, tile], dtype=tl.int32)
                for other in range(j, j + m):
                    rival = tl.sum(tl.where(column[:, None] == other, score, 0.0), axis=0)[None, :]
                    earlier = (rival < score) | ((rival == score) & (other < column[:, None]))
                    before += earlier.to(tl.int32)
                chosen = (column[:, None] >= j) & (column[:, None] < j + m)
                keep = tl.where(chosen, (before >= m - n).to(tl.int32), keep)
        # e_j = w_j / U_jj where pruned, otherwise 0. Registers cannot be indexed by j, so a masked sum picks column j.
        here = column[:, None] == j
        pivot = tl.load(factor + j * columns + j)
        removed = _quotient(tl.sum(tl.where(here & (keep == 0), value, 0.0), axis=0), pivot)
        # W_k -= e_j U_jk for the later columns k.
        later = tl.load(factor + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        value -= later[:, None] * removed[None, :]
        value = tl.where(here & (keep == 0), 0.0, value)
        error = tl.where(here, removed[None, :], error)
    tl.store(weight + place, value, mask=there)
    tl.store(errors + place, error, mask=there)
    if m > 0:
        tl.store(mask + place, keep.to(tl.int8), mask=there)


def prune_columns(weight: Tensor, factor: Tensor, choice: Pattern | Tensor) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place, like `pruneforge_sparsegpt.metric.prune_columns`.

    Args:
        weight: W^T of the block [columns, out], contiguous; replaced by the pruned and compensated weight.
        factor: U of these columns [columns, columns].
        choice: A pattern, which selects the mask, or the mask, boolean [columns, out].

    Returns:
        The errors [columns, out], for the columns to the right, and the mask, boolean [columns, out].
    """
    columns, rows = weight.shape
    errors = torch.empty_like(weight)
    n, m = 0, 0
    if isinstance(choice, NM):
        n, m = choice.n, choice.m
        mask = torch.ones_like(weight, dtype=torch.int8)
    elif isinstance(choice, Tensor):
        mask = choice.contiguous().to(torch.int8)
    else:
        # An unstructured mask compares all rows of the block, which one program does not see.
        scores = (weight / factor.diagonal()[:, None]).square_()
        mask = choice.within("layer").select(scores.T).T.contiguous().to(torch.int8)
    factor = factor.contiguous()  # the factorisation returns a column-major one
    # Triton launches on the current device, whatever the tensors' device.
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _prune_tile[(triton.cdiv(rows, TILE),)](
            weight,
            errors,
            mask,
            factor,
            rows,
            columns,
            n,
            m,
            triton.next_power_of_2(columns),
            TILE,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return errors, mask.bool()
