"""Arithmetic of a run: full float32 products, narrower units where they are exact, and seeded random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA: Any = torch.backends.cuda  # `Any`: parts of these are missing from torch's type hints
CUDNN: Any = torch.backends.cudnn
MKLDNN: Any = torch.backends.mkldnn

NARROW = {("cpu", torch.bfloat16): "bf16"}
"""By device and dtype: units that represent every value of the dtype exactly and sum in float32.

CUDA's tensor cores represent bfloat16 and float16 exactly too, but round their sums toward zero. They are not used
until masks are shown not to change (`make bench-cuda` compares them).
"""


@contextmanager
def exact_arithmetic(seed: int, device: torch.device) -> Iterator[None]:
    """Use full float32 products, repeatable kernels and seeded random numbers within the context.

    The caller's settings and random number generators are restored afterwards.

    Args:
        seed: Seed of the random numbers.
        device: Where to compute. It becomes torch's current device; no other device is touched, so a run on the CPU
            does not initialise CUDA.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []), ExitStack() as settings:
        if on_cuda:
            settings.enter_context(torch.cuda.device(device))
        settings.enter_context(_precision(CUDA.matmul, "ieee"))
        settings.enter_context(_precision(MKLDNN.matmul, "ieee"))
        settings.enter_context(_convolutions())
        others = random.getstate(), np.random.get_state()
        seed_random_numbers(seed, device)
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """Seed the generators of torch on the CPU and on `device` only, unlike `torch.manual_seed`, of Python and numpy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let float32 products of values that were converted from `dtype` run on the units for that dtype.

    bfloat16 is exact in these units, products of two bfloat16 values are exact in float32, and sums are float32. So the
    result is as exact as with float32 units, only several times faster.
    """
    precision = NARROW.get((device.type, dtype))
    if precision is None:
        yield
    else:
        with _precision(MKLDNN.matmul, precision):
            yield


@contextmanager
def repeatable_gradients(device: torch.device) -> Iterator[None]:
    """Use attention kernels with a repeatable backward pass within the context.

    On CUDA the backward passes of flash and memory-efficient attention add with atomics, in an order that varies. Plain
    matrix products do not, but take memory for every pair of tokens of a sample.
    """
    if device.type == "cuda":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@contextmanager
def _precision(backend: Any, name: str) -> Iterator[None]:
    """Set the precision of one backend's float32 products within the context."""
    # The older setters raise once a program has used the newer ones, as transformers does for its `tf32` argument.
    before = backend.fp32_precision
    backend.fp32_precision = name
    try:
        yield
    finally:
        # Inherit from the settings above this one, as by default, if that restores the value.
        backend.fp32_precision = "none"
        if backend.fp32_precision != before:
            backend.fp32_precision = before


@contextmanager
def _convolutions() -> Iterator[None]:
    """Use full float32 convolutions and repeatable algorithms, rather than those that a trial finds fastest."""
    before = CUDNN.deterministic, CUDNN.benchmark
    CUDNN.deterministic, CUDNN.benchmark = True, False
    try:
        with _precision(CUDNN.conv, "ieee"), _precision(CUDNN.rnn, "ieee"), _precision(MKLDNN.conv, "ieee"):
            yield
    finally:
        CUDNN.deterministic, CUDNN.benchmark = before


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and scores of `dtype` values: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, in one pass and without a temporary tensor."""
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """Return `all_finite` as a boolean tensor [] on the tensor's device, without waiting for the device."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    # NaN shows in both: `aminmax` propagates it.
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)


def first_false(flags: Sequence[Tensor]) -> int | None:
    """Return the index of the first false flag, or `None`; flags are boolean tensors [], and the host waits once."""
    return next((place for place, flag in enumerate(torch.stack(list(flags)).tolist()) if not flag), None)


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Set weights that `mask` prunes to zero, in place, and return the weight; both have the same number of values."""
    # Multiplied as integers: that gives +0 for negative weights too, and is several times as fast.
    bits = weight.view(_BITS[weight.element_size()])
    bits.mul_(mask.view(weight.shape))
    return weight
