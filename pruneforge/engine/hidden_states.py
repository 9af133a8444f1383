"""Store hidden states between blocks: on the device, then in host memory, then on disk."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruneforge.checkpoint.durable import writing
from pruneforge.checkpoint.tensors import as_bytes
from pruneforge.engine.transfers import Transfer, Transfers, bytes_in_host_memory
from pruneforge.errors import UnfinishedError
from pruneforge.interfaces.batch import Batch


@dataclass(frozen=True)
class Call:
    """The arguments of a block other than its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BatchInFlight:
    """One batch on its way through the blocks.

    Attributes:
        batch: The batch, on the device.
        handle: The stored input of the next block.
        calls: For each block, its other arguments.
    """

    batch: Batch
    handle: Handle
    calls: list[Call]

    @property
    def hidden(self) -> Tensor:
        """Input of the next block [samples, ..., hidden], on the device."""
        return self.handle.get()

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self.handle = self.handle.store.keep(value)


def with_hidden_states(batches: Sequence[BatchInFlight]) -> Iterator[tuple[BatchInFlight, Tensor]]:
    """Yield each batch and its input of the next block on the device, prefetching one batch ahead."""
    if batches:
        store = batches[0].handle.store
        yield from zip(batches, store.each(in_flight.handle for in_flight in batches), strict=True)


@dataclass
class Tier:
    """One kind of memory, with a limit.

    Attributes:
        capacity: Bytes it may hold.
        used: Bytes it holds.
        peak: The most bytes it has held.
    """

    capacity: float
    used: int = 0
    peak: int = 0

    def reserve(self, size: int) -> bool:
        """Reserve `size` bytes and return `True`, or return `False` if they do not fit."""
        if self.used + size > self.capacity:
            return False
        self.used += size
        self.peak = max(self.peak, self.used)
        return True

    def release(self, size: int) -> None:
        """Give back `size` reserved bytes."""
        self.used -= size


class HiddenStates:
    """Stores tensors in the first tier with room, and returns them on the device.

    Attributes:
        device: Where `Handle.get` returns tensors.
        tiers: Device, host and disk, by name, in the order they are filled.
    """

    def __init__(
        self,
        device: torch.device,
        device_bytes: float = float("inf"),
        host_bytes: float = float("inf"),
        folder: Path | None = None,
    ) -> None:
        """Start empty.

        Args:
            device: Where to compute.
            device_bytes: Limit on the device; ignored if that is the CPU.
            host_bytes: Limit in host memory.
            folder: Folder for tensors that fit in neither, created on first use; by default a temporary folder.
        """
        self.device = device
        self.tiers = {
            "device": Tier(0 if device.type == "cpu" else device_bytes),
            "host": Tier(host_bytes),
            "disk": Tier(float("inf")),
        }
        self._transfers = Transfers(device)
        self._folder = folder
        self._numbers = itertools.count()

    def keep(self, tensor: Tensor) -> Handle:
        """Store a tensor and return its handle.

        The tensor is dropped, and its bytes are free again, once nothing refers to the handle.

        Raises:
            UnfinishedError: It has to go to the disk, and the disk cannot be written.
        """
        on_host = bytes_in_host_memory(tensor.nbytes, self._transfers.pinned)
        sizes = {"device": tensor.nbytes, "host": on_host, "disk": tensor.nbytes}
        name = next(name for name, tier in self.tiers.items() if tier.reserve(sizes[name]))
        tier, size = self.tiers[name], sizes[name]
        # Finalizers return the bytes: the gradient sweeps' lists share handles with the batches in flight, so no
        # single owner knows when the last user is done.
        if name == "disk":
            # Keep the order of dimensions in memory: kernels choose by it how they add up, and so how they round.
            strides = tensor.stride()
            order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
            path = self._write(tensor.permute(order))
            handle = Handle(self, None, path, tensor.dtype, tuple(tensor.shape), order)
            weakref.finalize(handle, _forget, path, tier, size)
        else:
            transfer = Transfer(tensor) if name == "device" else self._transfers.to_host(tensor)
            handle = Handle(self, transfer, None, tensor.dtype, tuple(tensor.shape))
            weakref.finalize(handle, tier.release, size)
        return handle

    def each(self, handles: Iterable[Handle]) -> Iterator[Tensor]:
        """Yield tensors on the device, in order; each is fetched while the caller works on the one before."""
        coming: Transfer | None = None
        for handle in handles:
            begun = handle.fetch()
            if coming is not None:
                yield coming.on_device()
            coming = begun
        if coming is not None:
            yield coming.on_device()

    def to_device(self, source: Transfer | Tensor) -> Transfer:
        """Start copying a tensor to the device, unless it is there already."""
        tensor = source.tensor if isinstance(source, Transfer) else source
        if tensor.device == self.device:
            return Transfer(tensor)
        return self._transfers.to_device(source)

    def close(self) -> None:
        """Delete the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, tensor: Tensor) -> Path:
        """Write a tensor, in index order, to a new file."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="pruneforge-activations-"))
        with writing(self._folder, "folder of hidden states"):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{next(self._numbers)}.bin"
            # Not synced: a resumed run computes hidden states again and never reads these files.
            as_bytes(tensor.cpu().contiguous()).numpy().tofile(path)
        return path


@dataclass(eq=False)
class Handle:
    """A tensor in a store; see `HiddenStates.keep`.

    Attributes:
        store: The store.
        path: Its file, if it is on disk.
        dtype: Its dtype.
        shape: Its shape.
    """

    store: HiddenStates
    _transfer: Transfer | None
    path: Path | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    _order: Sequence[int] = ()  # on disk: the dimensions from the largest stride to the smallest

    def get(self) -> Tensor:
        """Return the tensor on the store's device."""
        return self.fetch().on_device()

    def fetch(self) -> Transfer:
        """Start copying the tensor to the store's device.

        Raises:
            UnfinishedError: Its file cannot be read.
        """
        if self._transfer is not None:
            return self.store.to_device(self._transfer)
        assert self.path is not None
        try:
            data = torch.from_numpy(np.fromfile(self.path, np.uint8))
        except OSError as error:
            raise UnfinishedError(
                f"{str(self.path)!r} cannot be read: {error.strerror}; go on with `resume`"
            ) from error
        as_written = data.view(self.dtype).view([self.shape[dim] for dim in self._order])
        return self.store.to_device(as_written.permute([self._order.index(dim) for dim in range(len(self._order))]))


def _forget(path: Path, tier: Tier, size: int) -> None:
    path.unlink(missing_ok=True)
    tier.release(size)
