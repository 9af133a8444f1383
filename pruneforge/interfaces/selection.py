"""Select the smallest scores: exact counts, ties by index, no sorting.

A mask is boolean, `True` keeps. Of equal scores, those with the lower index are pruned first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22
"""Number of scores that a thread selects from at a time."""

FEW_ROWS = 16
"""Up to this many rows, a GPU selects with many thread blocks for each row."""

KEYS = 1 << 24
"""Number of scores that a radix pass handles at a time; its 64-bit integers take about ten times their memory."""


def prune_smallest(scores: Tensor, count: int) -> Tensor:
    """Return the mask that prunes exactly the `count` smallest scores of each row.

    Args:
        scores: [rows, columns], higher is more important, no NaN.
        count: 0 to columns.

    Returns:
        Boolean [rows, columns], `True` keeps.
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, count)[:, None]
    keep = scores > threshold
    # Of the scores equal to the threshold, the last ones are kept, as many as the count leaves room for.
    room = (scores.shape[1] - count) - count_kept(keep)
    if keep.device.type != "cpu":
        keep |= _last(scores == threshold, room)
    elif room.any():
        rows, columns = (scores == threshold).nonzero(as_tuple=True)
        ends = torch.bincount(rows, minlength=len(scores)).cumsum(0)
        after = ends[rows] - 1 - torch.arange(len(rows))  # number of later ties in the same row
        stays = after < room[rows]
        keep[rows[stays], columns[stays]] = True
    return keep


def prune_smallest_of_all(scores: Tensor, count: int) -> Tensor:
    """Return the mask that prunes exactly the `count` smallest scores of a matrix.

    Args:
        scores: [rows, columns], higher is more important, no NaN; fastest if it or its transpose is contiguous.
        count: 0 to all.

    Returns:
        Boolean [rows, columns], `True` keeps, with the same memory order as the scores.
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    in_memory = scores if scores.is_contiguous() else scores.T
    threshold = kth_smallest(in_memory.reshape(1, -1), count)
    keep = in_memory > threshold
    room = scores.numel() - count - count_kept(keep.reshape(1, -1))
    keep = keep if in_memory is scores else keep.T
    # Of the scores equal to the threshold, the last ones by index are kept, whatever the order in memory.
    if keep.device.type != "cpu":
        keep |= _last((scores == threshold).reshape(1, -1), room).view_as(keep)
    elif room.any():
        keep[(scores == threshold).nonzero()[-int(room) :].unbind(1)] = True
    return keep


def _last(ties: Tensor, room: Tensor) -> Tensor:
    """Return the last `room` [rows] of the ties in each row, both matrices boolean [rows, columns].

    Counts over the whole matrix: to list the ties, the host would have to wait for the device to count them.
    """
    place = ties.cumsum(1, dtype=torch.int32)
    return ties & (place > place[:, -1:] - room[:, None])


def count_kept(mask: Tensor) -> Tensor:
    """Return how many weights of each row a mask [rows, columns] keeps, int64 [rows]."""
    if mask.device.type != "cpu":
        return mask.sum(dim=1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))  # ten times as fast as torch's sum


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score of each row of `scores` [rows, columns], as [rows]; k counts from 1.

    On the CPU this uses numpy's partition on all of torch's threads: it is vectorised, several times as fast as
    torch's own selection, and allocates no indices.
    """
    if scores.device.type != "cpu":
        # kthvalue gives each row to one thread block; with few, long rows the rest of the GPU would be idle.
        if len(scores) <= FEW_ROWS:
            return scores.topk(k, dim=1, largest=False, sorted=False).values.amax(1)
        return scores.kthvalue(k, dim=1).values
    values = torch.empty(len(scores), dtype=scores.dtype)
    step = max(1, CHUNK // max(1, scores.shape[1]))

    def partition(start: int) -> None:
        part = scores[start : start + step].numpy()
        values[start : start + step] = torch.from_numpy(np.partition(part, k - 1, axis=1)[:, k - 1].copy())

    starts = range(0, len(scores), step)
    if len(starts) <= 1:  # starting threads takes longer than a small selection
        for start in starts:
            partition(start)
        return values
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(partition, starts))
    return values


class Threshold:
    """Prunes all scores below a value, and a given number of those equal to it, in order.

    Selects from a comparison group that spans several layers: call `select` once for each layer, in model order.

    Attributes:
        value: The smallest score that may be kept.
        ties: Number of scores equal to `value` that are still to be pruned.
    """

    def __init__(self, value: float, ties: int) -> None:
        self.value = value
        self.ties = ties

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask, boolean [out, in], of the next layer's scores [out, in]."""
        keep = scores >= self.value
        ties = (scores == self.value).nonzero()[: self.ties]  # by index, whatever the order in memory
        keep[ties.unbind(1)] = False
        self.ties -= len(ties)
        return keep


def smallest(scores: Callable[[], Iterable[Tensor]], count: int) -> Threshold:
    """Return the threshold that prunes exactly `count` of all scores, without holding them all in memory.

    A radix selection on the bits of the scores, sixteen bits per pass: two passes over float32.

    Args:
        scores: Yields the same tensors at each call, all float32 or all float64.
        count: Number of scores to prune, 1 to all.
    """
    prefix, remaining, passed, width, dtype = 0, count, 0, 32, torch.float32
    while passed < width:
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for part in (part for tensor in scores() for part in tensor.flatten().split(KEYS)):
            dtype, width = part.dtype, 8 * part.element_size()
            key = _ordered_bits(part)
            if passed:
                key = key[(key >> (width - passed)) == prefix] & ((1 << (width - passed)) - 1)
            digit = key >> (width - passed - 16)
            histogram += torch.bincount(digit if passed else digit + (1 << 15), minlength=1 << 16).cpu()
        cumulative = histogram.cumsum(0)
        bucket = int(torch.searchsorted(cumulative, remaining))
        remaining -= int(cumulative[bucket] - histogram[bucket])
        prefix = (prefix << 16) + bucket if passed else bucket - (1 << 15)
        passed += 16
    return Threshold(_from_ordered_bits(prefix, dtype), remaining)


_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def _ordered_bits(scores: Tensor) -> Tensor:
    """Map floats to integers, int64 [n], that are ordered like them; -0 equals 0."""
    integer = _INTEGER[scores.dtype]
    bits = (scores.flatten() + 0.0).view(integer)  # adding 0 turns -0 into 0
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits).to(torch.int64)


def _from_ordered_bits(key: int, dtype: torch.dtype) -> float:
    integer = _INTEGER[dtype]
    bits = key if key >= 0 else key ^ torch.iinfo(integer).max
    return torch.tensor([bits], dtype=integer).view(dtype).item()
