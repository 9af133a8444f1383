"""Copies between host memory and the device, beside the computation where the device can do both at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transfer:
    """A copy that has begun, or a tensor that is where it is wanted already.

    Attributes:
        tensor: What is copied to; not to be touched before one of the methods has returned it.
        event: Happens on the device when the copy is complete; `None` if it is complete already.
    """

    tensor: Tensor
    event: torch.cuda.Event | None = None

    def on_host(self) -> Tensor:
        """Wait for a copy to host memory, and return it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor

    def on_device(self) -> Tensor:
        """Have the current stream wait for a copy to the device, and return it; the host does not wait."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)  # its memory is not given away before what this stream does with it
        return self.tensor


class Transfers:
    """Copies to and from one device; on CUDA in a stream of their own, in the order they were asked for.

    Attributes:
        device: The other end.
        pinned: Whether host memory has to be pinned for copies to go on beside the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.pinned else None

    def to_host(self, tensor: Tensor) -> Transfer:
        """Begin to copy a tensor from the device; the current stream must have been given what makes it.

        A tensor that is in host memory is not copied: what comes back is the tensor itself.
        """
        if self._stream is None or not tensor.is_cuda:
            return Transfer(tensor.to("cpu"))
        target = torch.empty_like(tensor, device="cpu", pin_memory=True)  # as it lies in memory: kernels look at that
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            return Transfer(target, self._stream.record_event())

    def to_device(self, source: Transfer | Tensor, dtype: torch.dtype | None = None) -> Transfer:
        """Begin to copy a tensor from host memory, as `dtype` or its own.

        Args:
            source: A tensor in host memory, pinned if the copy is to go on by itself, or a copy that `to_host` of the
                same object began; that need not be complete, since both are in one stream. Pinned memory is not used
                again before the copy is complete, even if it is freed.
            dtype: Dtype on the device.
        """
        tensor = source.tensor if isinstance(source, Transfer) else source
        if self._stream is None:
            return Transfer(tensor.to(self.device).to(dtype or tensor.dtype))
        with torch.cuda.stream(self._stream):
            value = tensor.to(self.device, non_blocking=True).to(dtype or tensor.dtype)
            return Transfer(value, self._stream.record_event())

    def finish(self) -> None:
        """Wait for everything that was begun."""
        if self._stream is not None:
            self._stream.synchronize()


def thread_initializer(device: torch.device) -> Callable[[], None] | None:
    """Return what a new thread has to call first, if anything.

    A thread begins on CUDA device 0, and what it does may make a context there even if the run uses another device.
    """
    return partial(torch.cuda.set_device, device) if device.type == "cuda" else None


def bytes_in_host_memory(size: int, pinned: bool) -> int:
    """Return what so many bytes take in host memory; torch hands out pinned memory in powers of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size
