"""Products of bfloat16 and float16 where torch has no fast ones, as on a CPU without instructions for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.bfloat16, torch.float16)
"""Those that float32 products can stand in for."""


@functools.cache
def is_fast(dtype: torch.dtype) -> bool:
    """Return whether torch has fast products of one of `DTYPES` on this CPU, by its instructions as a rule."""
    mkldnn: Any = torch.ops.mkldnn
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return torch.backends.mkldnn.is_available() and bool(getattr(mkldnn, supported[dtype])())


def wide_products(module: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Compute a model's products in float32, and round each once, where torch has no fast ones of its dtype.

    Args:
        module: The model.
        device: Where it runs.
    """
    dtypes = {parameter.dtype for parameter in module.parameters()}
    slow = {dtype for dtype in DTYPES if dtype in dtypes and not is_fast(dtype)}
    # Not for every model: looking at each operation costs microseconds.
    return WideProducts(slow) if slow and device.type == "cpu" else nullcontext()


class WideProducts(TorchDispatchMode):
    """Within the context, compute products of `dtypes` in float32 on the CPU, and round each once.

    Where a CPU has no instructions for a dtype, torch takes up to ten times as long for a linear layer as in float32,
    and hundreds of times for its gradients (`benchmarks/half_precision.py`). Instructions for it sum in float32 too, so
    the results differ from theirs by the order of the sum alone. Float32 copies of the factors and of the result are
    held for one product at a time.

    Args:
        dtypes: Which products to compute so, of `DTYPES`.
    """

    supports_higher_order_operators = True
    """As torch asks a mode: what a model compiles or branches by runs as it is."""

    def __init__(self, dtypes: Set[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave what a model compiles to its compiler."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one operation of torch."""
        kwargs = kwargs or {}
        if func in _WHOLE and args[0].dtype in self._dtypes:
            with self:
                return func.decompose(*args, **kwargs)
        if func in _PRODUCTS and self._takes(args[:3], kwargs) and not _of_few_rows(func, args):
            dtype = args[0].dtype
            wide = [_cast(value, dtype, torch.float32) for value in args]
            named = {name: _cast(value, dtype, torch.float32) for name, value in kwargs.items()}
            results = func(*wide, **named)
            if isinstance(results, tuple):
                return tuple(_cast(result, torch.float32, dtype) for result in results)
            return results.to(dtype)
        return func(*args, **kwargs)

    def _takes(self, values: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Return whether factors, and the result, are of one dtype of these and on the CPU; torch refuses mixtures."""
        factors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        found = {(factor.dtype, factor.device.type) for factor in factors}
        return len(found) == 1 and found <= {(dtype, "cpu") for dtype in self._dtypes} and not named.get("out_dtype")


_ATEN = torch.ops.aten
# Not the forward pass of attention, which torch computes in bfloat16 about as fast as in float32.
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._grouped_mm.default,  # of experts
    _ATEN.convolution.default,
    _ATEN.convolution_backward.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
_WHOLE = {_ATEN.linear.default, _ATEN.matmul.default, _ATEN.conv1d.default, _ATEN.conv2d.default}
"""What arrives whole in inference mode, the product within it unseen."""

_FEW = 8
"""Rows up to which torch reads a weight of a thousand columns as fast as it is as a float32 copy of it is made."""


def _of_few_rows(func: Any, args: Any) -> bool:
    """Return whether a product is that of a linear layer with few tokens, as when text is generated."""
    if func not in (_ATEN.mm.default, _ATEN.addmm.default):
        return False
    rows, weight = args[-2:]
    return bool(rows.shape[0] <= _FEW and weight.stride(0) == 1)


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Return a tensor of dtype `before` in dtype `after`, and anything else as it is."""
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value
