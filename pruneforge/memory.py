"""Memory of this process: in use, and at its peak."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pruneforge.errors import DeviceFullError

_MOUNTS = {
    "": (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")),
    "memory": (Path("/sys/fs/cgroup/memory"),),
}
"""Where the groups of each version are, by their controller in `/proc/self/cgroup`."""

_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of a group's limit and use, and the name of what the kernel gives back of the use when memory is needed."""


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
            f"the device has no room left: {reason}{_within(error)}; free some of it and run again (with "
            "`resume` if there is an unfinished output), or begin anew with a smaller `batch_size` or "
            "`device_memory_budget`"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        raise DeviceFullError(
            f"the host has no memory left{_within(error)}; free some of it and run again (with `resume` if there is an "
            "unfinished output), or begin anew with a smaller `batch_size` or `memory_budget`"
        ) from error


def _within(error: BaseException) -> str:
    """Return what was at work when memory was full, if a note says so; the first one is the innermost."""
    return "".join(f", {note}" for note in getattr(error, "__notes__", [])[:1])


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


def free_bytes() -> int:
    """Return the bytes of host memory free for this process: on the machine, or within its control groups if less."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 1 << 18
    free = pages * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(match[1]) * 1024 if match else free
    return max(0, min([free, *_free_in_groups()]))


def _free_in_groups() -> Iterator[int]:
    """Yield what is left to each control group of this process, as containers and schedulers make them."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # the second version of control groups, or the first
            for mount in _MOUNTS[controllers]:
                # In a container the path may be of the machine outside, and the container's group be at the mount.
                inside = [] if ".." in path else [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
                for folder in dict.fromkeys([*(mount / place for place in inside), mount]):
                    yield from _left(folder, controllers)


def _left(folder: Path, controllers: str) -> Iterator[int]:
    """Yield the bytes left to a control group, if it has a limit."""
    limit, used, given_back = _FILES[controllers]
    try:
        most, now = (folder / limit).read_text().strip(), (folder / used).read_text()
        found = re.search(rf"^{given_back} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:  # there is no such group here, or no limit to it
        return
    if most.isdigit():
        yield int(most) - int(now) + (int(found[1]) if found else 0)


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
