"""SparseGPT's inner loop as a Triton kernel: a tile of rows and the factor of one block of columns on chip.

Rows do not depend on each other once the mask is chosen, and an N:M mask depends on its own row alone. Each program
takes some rows through all columns of the block, and only then writes them back.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneforge import NM, Pattern

TILE = 16
"""Rows of the layer that a program takes."""

WARPS = 8
"""Warps of a program. With these two no variant that is sent spills registers in its loops, and a layer of 4096 rows
makes 256 programs, which fill a large GPU."""

WIDEST = {torch.float32: 256, torch.float64: 128}
"""Columns whose values fit into registers with these rows, by dtype."""


@triton.jit
def _quotient(dividend: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """Divide, rounded to the nearest; of float32 numbers `/` is only nearly so."""
    if dividend.dtype == tl.float32:  # noqa: SIM108 - known when this is compiled: the other branch is not
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
    """Prune `tile` rows of a block of columns in tensors [columns, rows]; with m = 0 the mask is given.

    Triton compiles the annotations too: nothing may stand there that it does not know. Divisions are rounded to the
    nearest and multiplications are not fused with additions, so that no version of Triton rounds otherwise.
    """
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, width)
    place = column[:, None] * rows + row[None, :]
    there = (column[:, None] < columns) & (row[None, :] < rows)
    value = tl.load(weight + place, mask=there, other=0.0)
    keep = tl.load(mask + place, mask=there, other=1).to(tl.int32)
    diagonal = tl.load(factor + column * columns + column, mask=column < columns, other=1.0)
    error = tl.zeros_like(value)
    for j in range(columns):
        if m > 0:  # noqa: SIM102 - known when this is compiled: without groups nothing of it is left
            if j % m == 0:
                ratio = _quotient(value, diagonal[:, None])
                score = ratio * ratio
                # How many of its group are pruned before a weight: those smaller, and those equal before it.
                before = tl.zeros([width, tile], dtype=tl.int32)
                for other in range(j, j + m):
                    rival = tl.sum(tl.where(column[:, None] == other, score, 0.0), axis=0)[None, :]
                    earlier = (rival < score) | ((rival == score) & (other < column[:, None]))
                    before += earlier.to(tl.int32)
                chosen = (column[:, None] >= j) & (column[:, None] < j + m)
                keep = tl.where(chosen, (before >= m - n).to(tl.int32), keep)
        here = column[:, None] == j
        pivot = tl.load(factor + j * columns + j)
        removed = _quotient(tl.sum(tl.where(here & (keep == 0), value, 0.0), axis=0), pivot)
        later = tl.load(factor + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        value -= later[:, None] * removed[None, :]
        value = tl.where(here & (keep == 0), 0.0, value)
        error = tl.where(here, removed[None, :], error)
    tl.store(weight + place, value, mask=there)
    tl.store(errors + place, error, mask=there)
    if m > 0:
        tl.store(mask + place, keep.to(tl.int8), mask=there)


def prune_columns(weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place, as `pruneforge_sparsegpt.metric.prune_columns` does.

    Args:
        weight: [columns, out], contiguous, replaced by what stays, compensated.
        factor: U of these columns [columns, columns].
        pattern: Selects the mask.

    Returns:
        The errors [columns, out] for the columns to the right, and the mask [columns, out].
    """
    columns, rows = weight.shape
    errors = torch.empty_like(weight)
    if isinstance(pattern, NM):
        n, m = pattern.n, pattern.m
        mask = torch.ones_like(weight, dtype=torch.int8)
    else:
        n, m = 0, 0
        scores = (weight / factor.diagonal()[:, None]).square_()
        mask = pattern.within("layer").select(scores.T).T.contiguous().to(torch.int8)
    factor = factor.contiguous()  # the factorisation leaves it column by column
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():  # else it runs on the current one
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
