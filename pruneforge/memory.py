"""What a process holds in memory, and the most it held."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pruneforge.errors import UnfinishedError


class PeakMemory:
    """Measures the peak from its creation to `read`.

    On Linux the kernel's own peak of resident memory is reset at the start; where that is not allowed,
    and elsewhere, the peak of the whole process is reported and says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset = _reset_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, Any]:
        """Return peak bytes of host memory and what they cover; on CUDA, of the device's tensors and torch's pools."""
        found: dict[str, Any] = {"host_bytes": _peak(), "host_covers": "run" if self._reset else "process"}
        if self._device.type == "cuda":
            found["device_bytes"] = torch.cuda.max_memory_allocated(self._device)
            found["device_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
        return found


@contextmanager
def one_line_for_full_devices() -> Iterator[None]:
    """Convert torch's error about a device without room into one line.

    Raises:
        UnfinishedError: The device is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UnfinishedError(
            f"the device has no room left: {reason}; free some of it and run again (with `resume` if there is an "
            "unfinished output), or use a smaller `batch_size` or `device_memory_budget`"
        ) from error


def resident_bytes() -> int:
    """Return what the process takes in host memory now, or 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


TOKENS_ON_CPU, TOKENS_ON_DEVICE = 1024, 4096
"""Tokens that go through a block together: on a CPU so few that they stay near its caches."""


def usual_tokens_a_batch(device: torch.device) -> int:
    """Return how many tokens go through a block together where memory is no question."""
    return TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_DEVICE
