"""Memory of this process: in use, and at its peak."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pruneforge.errors import DeviceFullError


class PeakMemory:
    """Measures peak memory from its creation to `read`.

    On Linux the kernel's peak of resident memory is reset at the start. Where that is not possible, the peak of the
    whole process is reported, and `host_covers` is "process".
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset = _reset_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, Any]:
        """Return peak bytes of host memory and what they cover; on CUDA also those of tensors and of torch's pools."""
        measured: dict[str, Any] = {"host_bytes": _peak(), "host_covers": "run" if self._reset else "process"}
        if self._device.type == "cuda":
            measured["device_bytes"] = torch.cuda.max_memory_allocated(self._device)
            measured["device_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
        return measured


@contextmanager
def one_line_for_full_devices() -> Iterator[None]:
    """Convert errors of full memory within the context, the device's or the host's, into `DeviceFullError`.

    Raises:
        DeviceFullError: Memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise DeviceFullError(
            f"the device has no room left: {reason}; free some of it and run again (with `resume` if there is an "
            "unfinished output), or begin anew with a smaller `batch_size` or `device_memory_budget`"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        raise DeviceFullError(
            "the host has no memory left; free some of it and run again (with `resume` if there is an unfinished "
            "output), or begin anew with a smaller `batch_size` or `memory_budget`"
        ) from error


def is_full_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the host or a device is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no class for it


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, on the host and from torch's pools on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def resident_bytes() -> int:
    """Return the bytes of host memory that this process uses now, or 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _reset_peak() -> bool:
    """Reset the kernel's peak of resident memory; return whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    """Return the peak bytes of resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


TOKENS_ON_CPU, TOKENS_ON_DEVICE = 1024, 4096
"""Number of tokens that go through a block together; on a CPU few, so that they stay near its caches."""


def usual_tokens_a_batch(device: torch.device) -> int:
    """Return how many tokens go through a block together if memory is not limited."""
    return TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_DEVICE
