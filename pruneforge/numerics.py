"""The arithmetic of a run: full float32, narrower units where they lose nothing, and its own random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA: Any = torch.backends.cuda  # parts of them are missing from torch before 2.9, and from its type hints
CUDNN: Any = torch.backends.cudnn
MKLDNN: Any = torch.backends.mkldnn

NARROW = {("cpu", torch.bfloat16): "bf16"}
"""By device and dtype, the units that hold every value of that dtype and add up in float32.

CUDA's tensor cores hold bfloat16 and float16 whole too, but round their sums toward zero; they are left out until
masks are shown not to change (`make bench-cuda` compares them).
"""

LEGACY = {"ieee": "highest", "tf32": "high", "bf16": "medium"}
"""Names of the same precisions in the interface that torch had before 2.9."""


@contextmanager
def exact_arithmetic(seed: int, device: torch.device) -> Iterator[None]:
    """Full float32 products, repeatable kernels, and random numbers of the run's own that leave the caller's alone.

    Args:
        seed: Seed of the random numbers.
        device: Where the run computes. It is the current one within the context, and no other device is touched, so a
            run on the CPU does not initialise CUDA.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []), ExitStack() as settings:
        if on_cuda:
            settings.enter_context(torch.cuda.device(device))
        settings.enter_context(_precision(CUDA.matmul, "ieee"))
        settings.enter_context(_precision(MKLDNN.matmul, "ieee"))
        settings.enter_context(_convolutions())
        seed_random_numbers(seed, device)
        yield


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`; unlike `torch.manual_seed`, those of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Allow float32 products of values that came from `dtype` to run on units that are made for it.

    bfloat16 is exact in these units, a product of two fits float32, and sums are float32: the result is as exact as
    that of float32 units, and several times as fast.
    """
    precision = NARROW.get((device.type, dtype))
    if precision is None:
        yield
    else:
        with _precision(MKLDNN.matmul, precision):
            yield


@contextmanager
def repeatable_gradients(device: torch.device) -> Iterator[None]:
    """Compute attention, within the context, by kernels whose backward pass gives the same bits each time.

    On CUDA the backward passes of flash and memory-efficient attention add with atomics, in whatever order threads
    come; plain matrix products do not. They take memory for every pair of tokens of a sample.
    """
    if device.type == "cuda":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@contextmanager
def _precision(backend: Any, name: str) -> Iterator[None]:
    """Set the units of float32 products of one backend; before torch 2.9 there was one setting for all."""
    if not hasattr(torch.backends, "fp32_precision"):
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(LEGACY[name])
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    # The older setters raise once a program has used the newer ones, as transformers does for its `tf32` argument.
    before = backend.fp32_precision
    backend.fp32_precision = name
    try:
        yield
    finally:
        backend.fp32_precision = "none"  # inherited from the settings above it, if that gives what it was
        if backend.fp32_precision != before:
            backend.fp32_precision = before


@contextmanager
def _convolutions() -> Iterator[None]:
    """Full float32 convolutions, by the algorithm that is repeatable and not the one that a trial found fastest."""
    before = CUDNN.deterministic, CUDNN.benchmark
    CUDNN.deterministic, CUDNN.benchmark = True, False
    try:
        if hasattr(torch.backends, "fp32_precision"):
            with _precision(CUDNN.conv, "ieee"), _precision(CUDNN.rnn, "ieee"), _precision(MKLDNN.conv, "ieee"):
                yield
        else:
            legacy, CUDNN.allow_tf32 = CUDNN.allow_tf32, False
            try:
                yield
            finally:
                CUDNN.allow_tf32 = legacy
    finally:
        CUDNN.deterministic, CUDNN.benchmark = before


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and scores over values of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value is infinite or NaN, in one pass and without a temporary."""
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """Return what `all_finite` does as a tensor [] on the tensor's device, for which the host need not wait."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)


def first_false(flags: Sequence[Tensor]) -> int | None:
    """Return the place of the first flag [] that is false, if one is; the host waits once for all of them."""
    return next((place for place, flag in enumerate(torch.stack(list(flags)).tolist()) if not flag), None)


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Set to zero, in place, what `mask` prunes, and return the weight; both [out, in], or of as many values."""
    bits = weight.view(_BITS[weight.element_size()])  # as integers: exactly +0, and several times as fast
    bits.mul_(mask.view(weight.shape))
    return weight
