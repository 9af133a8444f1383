"""The arithmetic of a run: full float32, and narrower units where they lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NARROW = {("cpu", torch.bfloat16): "medium"}
"""By device and dtype, the precision whose units hold every value of that dtype and add up in float32."""


@contextmanager
def exact_arithmetic(seed: int) -> Iterator[None]:
    """Full float32 products, and random numbers of the run's own that leave the caller's alone."""
    convolution = torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _precision("highest"):
        torch.manual_seed(seed)
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = convolution


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Allow float32 products of values that came from `dtype` to run on units that are made for it.

    Such a value fits these units whole, a product of two fits float32, and sums are float32: the result is as exact as
    that of float32 units, and several times as fast.
    """
    precision = NARROW.get((device.type, dtype))
    if precision is None:
        yield
    else:
        with _precision(precision):
            yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
