"""Copy between host memory and the device, overlapping with computation on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transfer:
    """A copy in progress, or a tensor that needed none.

    Attributes:
        tensor: The target; valid only once one of the methods has returned it.
        event: Marks the end of the copy on the device; `None` if it is complete already.
    """

    tensor: Tensor
    event: torch.cuda.Event | None = None

    def on_host(self) -> Tensor:
        """Wait for a copy to host memory and return it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor

    def on_device(self) -> Tensor:
        """Make the current stream wait for a copy to the device and return it; the host does not wait."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.event)
            # It was allocated in the copying stream; without this its memory could be reused while this stream uses it.
            self.tensor.record_stream(stream)
        return self.tensor


class Transfers:
    """Copies to and from one device; on CUDA in a separate stream, in the order of the calls.

    Attributes:
        device: The device.
        pinned: Whether host memory must be pinned for copies to overlap with computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.pinned else None

    def to_host(self, tensor: Tensor) -> Transfer:
        """Start copying a tensor from the device; the work that computes it must be in the current stream.

        A tensor in host memory is not copied but returned itself.
        """
        if self._stream is None or not tensor.is_cuda:
            return Transfer(tensor.to("cpu"))
        # `empty_like` keeps the strides: kernels choose by them how they add up, and so how they round.
        target = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            return Transfer(target, self._stream.record_event())

    def to_device(self, source: Transfer | Tensor, dtype: torch.dtype | None = None) -> Transfer:
        """Start copying a tensor from host memory.

        Args:
            source: A tensor in host memory, pinned if the copy is to overlap with computation, or a copy started by
                `to_host` of the same object. That one need not be complete, since both are in one stream. Pinned
                memory may be freed at once: torch reuses it only after the copy.
            dtype: Dtype on the device; the tensor's own by default.
        """
        tensor = source.tensor if isinstance(source, Transfer) else source
        if self._stream is None:
            return Transfer(tensor.to(self.device).to(dtype or tensor.dtype))
        with torch.cuda.stream(self._stream):
            value = tensor.to(self.device, non_blocking=True).to(dtype or tensor.dtype)
            return Transfer(value, self._stream.record_event())

    def finish(self) -> None:
        """Wait for all copies started so far."""
        if self._stream is not None:
            self._stream.synchronize()


def thread_initializer(device: torch.device) -> Callable[[], None] | None:
    """Return the function that a new thread must call first, or `None`.

    Threads start on CUDA device 0, where their work may create a context even if the run uses another device.
    """
    return partial(torch.cuda.set_device, device) if device.type == "cuda" else None


def bytes_in_host_memory(size: int, pinned: bool) -> int:
    """Return how much host memory a tensor of `size` bytes takes; torch rounds pinned memory up to powers of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size
