"""A device without hardware: tensors that say they are on gpu:0, compute on the CPU, and refuse to meet host tensors.

    with SimulatedDevice() as device:
        ...  # torch.zeros(3, device=DEVICE), tensor.to(DEVICE), parameter.data = tensor_on_device

As on CUDA, a tensor of no dimensions may come from the host. The device counts what the host would wait for: a value
read, a copy to the host, an operation whose result has a size that the values decide.

What it does not cover: streams, events and pinned memory (the engine has them on CUDA alone), NCCL, memory that is
full, the rounding of GPU kernels, and kernels that torch has for the CPU only. `make test-cuda` covers these on a GPU.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:  # a private interface, which torch 2.4 does not have
    MISSING: str | None = "this torch cannot make a backend in Python"
else:
    MISSING = None
    _setup_privateuseone_for_python_backend("gpu")
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch takes it for the machine's accelerator now

DEVICE = torch.device("gpu:0") if MISSING is None else torch.device("meta")

MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
"""Operations that may see both places."""

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
WAITING |= {"aten::bincount", "aten::_unique2"}
"""Operations that the host waits for."""


class OnDevice(torch.Tensor):
    """A tensor whose values are on the CPU, in `raw`, and whose device is the simulated one."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


waits: Counter[str] = Counter()
"""How often the host would have waited, by operation."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if there and name not in MOVES:
        for tensor in tensors:
            if not isinstance(tensor, OnDevice) and tensor.dim():
                raise RuntimeError(f"{func}: a host tensor {tuple(tensor.shape)} meets tensors on the device")
    onto = _is_result_on_device(name, args, kwargs, bool(there))
    masked = name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
        isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in args[1] or ()
    )
    if there and (name in WAITING or masked or (name in MOVES and not onto)):
        waits[f"{name} of a mask" if masked else f"{name} to the host" if name in MOVES else name] += 1
    raws = {id(tensor.raw): tensor for tensor in there}
    if onto and kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return raws[id(value)] if id(value) in raws else OnDevice(value) if onto else value

    return tree_map(placed, result)


def _is_result_on_device(name: str, args: Any, kwargs: dict[str, Any], any_there: bool) -> bool:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == DEVICE.type
    return isinstance(args[0], OnDevice) if name == "aten::copy_" else any_there


def _bare(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


class _Dispatch(TorchDispatchMode):
    """Sees operations that make tensors of nothing too: torch.zeros(3, device=DEVICE)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Does what torch does not let a backend in Python do.

    `parameter.data` is set to a tensor of the other place, the parameter staying the object that it is, `tolist` reads
    a tensor of the device, and `torch.tensor` makes one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.data.__set__:  # made anew whenever it is asked for
            parameter, value = args
            if isinstance(parameter, OnDevice) != isinstance(value, OnDevice):
                swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
                return None
        if func is torch.Tensor.tolist:
            return func(args[0].to("cpu"))
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class SimulatedDevice(ExitStack):
    """Makes the device usable within the context, in the thread that enters it."""

    def __enter__(self) -> SimulatedDevice:
        super().__enter__()
        self.enter_context(_Functions())
        self.enter_context(_Dispatch())
        return self
