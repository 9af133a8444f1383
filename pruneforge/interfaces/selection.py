"""Selection of the smallest scores: exact counts, ties by index, never a sort.

A mask is boolean, `True` keeps. Of equal scores, those with the lower index are pruned first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22
"""Scores that a thread selects from at a time."""

FEW_ROWS = 16
"""Rows that a GPU selects from together, each with many thread blocks."""

KEYS = 1 << 24
"""Scores whose bits are looked at together: integers of 64 bits, and what is made of them, take ten times as much."""


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
    # Of the scores equal to the threshold, the last ones stay: those that the count leaves room for.
    room = (scores.shape[1] - count) - count_kept(keep)
    if keep.device.type != "cpu":
        keep |= _last(scores == threshold, room)
    elif room.any():
        rows, columns = (scores == threshold).nonzero(as_tuple=True)
        ends = torch.bincount(rows, minlength=len(scores)).cumsum(0)
        after = ends[rows] - 1 - torch.arange(len(rows))  # how many of its row's come later
        stays = after < room[rows]
        keep[rows[stays], columns[stays]] = True
    return keep


def prune_smallest_of_all(scores: Tensor, count: int) -> Tensor:
    """Return the mask that prunes exactly the `count` smallest scores of a matrix.

    Args:
        scores: [rows, columns], higher is more important, no NaN; fastest if it, or its transpose, is contiguous.
        count: 0 to all.

    Returns:
        Boolean [rows, columns], `True` keeps; it lies in memory as the scores do.
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    in_memory = scores if scores.is_contiguous() else scores.T
    threshold = kth_smallest(in_memory.reshape(1, -1), count)
    keep = in_memory > threshold
    room = scores.numel() - count - count_kept(keep.reshape(1, -1))
    keep = keep if in_memory is scores else keep.T
    # Of the scores equal to the threshold, the last ones stay, by index however they lie in memory.
    if keep.device.type != "cpu":
        keep |= _last((scores == threshold).reshape(1, -1), room).view_as(keep)
    elif room.any():
        keep[(scores == threshold).nonzero()[-int(room) :].unbind(1)] = True
    return keep


def _last(ties: Tensor, room: Tensor) -> Tensor:
    """Return the last `room` [rows] of the ties in each row of a boolean matrix [rows, columns].

    Counts through the whole matrix, so that the host need not wait for the device to know how many there are.
    """
    place = ties.cumsum(1, dtype=torch.int32)
    return ties & (place > place[:, -1:] - room[:, None])


def count_kept(mask: Tensor) -> Tensor:
    """Return how many of each row [rows] a mask [rows, columns] keeps, int64."""
    if mask.device.type != "cpu":
        return mask.sum(dim=1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))  # ten times as fast as torch's sum


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score [rows] of each row of `scores` [rows, columns], k from 1.

    On the CPU by numpy's partition, in the processor's vector registers and on every thread that torch has: several
    times as fast as torch's own selection, and without its indices.
    """
    if scores.device.type != "cpu":
        # kthvalue gives each row to one thread block, which leaves the rest of a GPU idle where rows are few and long.
        if len(scores) <= FEW_ROWS:
            return scores.topk(k, dim=1, largest=False, sorted=False).values.amax(1)
        return scores.kthvalue(k, dim=1).values
    found = torch.empty(len(scores), dtype=scores.dtype)
    step = max(1, CHUNK // max(1, scores.shape[1]))

    def partition(start: int) -> None:
        part = scores[start : start + step].numpy()
        found[start : start + step] = torch.from_numpy(np.partition(part, k - 1, axis=1)[:, k - 1].copy())

    starts = range(0, len(scores), step)
    if len(starts) <= 1:  # threads take longer to begin than a small selection takes
        for start in starts:
            partition(start)
        return found
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(partition, starts))
    return found


class Threshold:
    """Everything below one value, and so many of those equal to it, in the order they come.

    The selection of a comparison group that spans several layers: `select` is called once a layer, in
    the order of the model.

    Attributes:
        value: The smallest score that may stay.
        ties: How many of the scores equal to `value` are still to be pruned.
    """

    def __init__(self, value: float, ties: int) -> None:
        self.value = value
        self.ties = ties

    def select(self, scores: Tensor) -> Tensor:
        """Return the mask of the next matrix of scores [out, in]."""
        keep = scores >= self.value
        ties = (scores == self.value).nonzero()[: self.ties]  # by index, however the scores lie in memory
        keep[ties.unbind(1)] = False
        self.ties -= len(ties)
        return keep


def smallest(scores: Callable[[], Iterable[Tensor]], count: int) -> Threshold:
    """Return the threshold that prunes exactly `count` of all scores, without holding them all.

    A radix selection on the bits of the scores: sixteen bits a pass, two passes over float32.

    Args:
        scores: Yields the same tensors, all of one dtype (float32 or float64), each time it is called.
        count: How many to prune, 1 to all.
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
        found = int(torch.searchsorted(cumulative, remaining))
        remaining -= int(cumulative[found] - histogram[found])
        prefix = (prefix << 16) + found if passed else found - (1 << 15)
        passed += 16
    return Threshold(_from_ordered_bits(prefix, dtype), remaining)


_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def _ordered_bits(scores: Tensor) -> Tensor:
    """Map floats to integers [n] int64 that compare alike; -0 equals 0."""
    integer = _INTEGER[scores.dtype]
    bits = (scores.flatten() + 0.0).view(integer)
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits).to(torch.int64)


def _from_ordered_bits(key: int, dtype: torch.dtype) -> float:
    integer = _INTEGER[dtype]
    bits = key if key >= 0 else key ^ torch.iinfo(integer).max
    return torch.tensor([bits], dtype=integer).view(dtype).item()
