"""Where hidden states wait for their next block: on the device while they fit, else in host memory, else on disk."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pruneforge.checkpoint.durable import writing
from pruneforge.checkpoint.shards import as_bytes
from pruneforge.engine.transfers import Transfer, Transfers, bytes_in_host_memory
from pruneforge.errors import UnfinishedError


@dataclass
class Home:
    """A place that holds so many bytes.

    Attributes:
        room: Bytes it may hold.
        used: Bytes it holds.
        peak: The most it held.
    """

    room: float
    used: int = 0
    peak: int = 0

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they fit."""
        if self.used + size > self.room:
            return False
        self.used += size
        self.peak = max(self.peak, self.used)
        return True

    def release(self, size: int) -> None:
        """Give back what was taken."""
        self.used -= size


class Store:
    """Keeps tensors within budgets and hands them out on the device.

    Attributes:
        device: Where `Kept.get` returns tensors.
        homes: The device's, the host's and the disk's use, by name.
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
            device: Where computation happens.
            device_bytes: What tensors may take there; not used if that is the host.
            host_bytes: What tensors may take in host memory.
            folder: Folder for what fits neither, made when needed; by default a temporary one.
        """
        self.device = device
        self.homes = {
            "device": Home(0 if device.type == "cpu" else device_bytes),
            "host": Home(host_bytes),
            "disk": Home(float("inf")),
        }
        self._transfers = Transfers(device)
        self._folder = folder
        self._numbers = itertools.count()

    def keep(self, tensor: Tensor) -> Kept:
        """Return a tensor's place; it is given up when nothing refers to what is returned."""
        on_host = bytes_in_host_memory(tensor.nbytes, self._transfers.pinned)
        sizes = {"device": tensor.nbytes, "host": on_host, "disk": tensor.nbytes}
        name = next(name for name, home in self.homes.items() if home.take(sizes[name]))
        home, size = self.homes[name], sizes[name]
        if name == "disk":
            strides = tensor.stride()
            order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])  # as it lies in memory
            path = self._write(tensor.permute(order))
            kept = Kept(self, None, path, tensor.dtype, tuple(tensor.shape), order)
            weakref.finalize(kept, _forget, path, home, size)
        else:
            held = Transfer(tensor) if name == "device" else self._transfers.to_host(tensor)
            kept = Kept(self, held, None, tensor.dtype, tuple(tensor.shape))
            weakref.finalize(kept, home.release, size)
        return kept

    def each(self, kept: Iterable[Kept]) -> Iterator[Tensor]:
        """Yield tensors on the device, in order; each is fetched while the caller works with the one before."""
        coming: Transfer | None = None
        for following in kept:
            begun = following.fetch()
            if coming is not None:
                yield coming.on_device()
            coming = begun
        if coming is not None:
            yield coming.on_device()

    def to_device(self, source: Transfer | Tensor) -> Transfer:
        """Begin to bring a tensor to the device, where it may be already."""
        tensor = source.tensor if isinstance(source, Transfer) else source
        if tensor.device == self.device:
            return Transfer(tensor)
        return self._transfers.to_device(source)

    def close(self) -> None:
        """Remove what is on disk."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, tensor: Tensor) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="pruneforge-activations-"))
        with writing(self._folder, "folder of hidden states"):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{next(self._numbers)}.bin"
            as_bytes(tensor.cpu().contiguous()).numpy().tofile(path)
        return path


@dataclass(eq=False)
class Kept:
    """A tensor that a store keeps.

    Attributes:
        path: The file that holds it, if it is on disk.
    """

    store: Store
    _held: Transfer | None
    path: Path | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    _order: Sequence[int] = ()

    def get(self) -> Tensor:
        """Return the tensor on the store's device."""
        return self.fetch().on_device()

    def fetch(self) -> Transfer:
        """Begin to bring the tensor to the store's device."""
        if self._held is not None:
            return self.store.to_device(self._held)
        assert self.path is not None
        try:
            data = torch.from_numpy(np.fromfile(self.path, np.uint8))
        except OSError as error:
            raise UnfinishedError(
                f"{str(self.path)!r} cannot be read: {error.strerror}; go on with `resume`"
            ) from error
        as_written = data.view(self.dtype).view([self.shape[dim] for dim in self._order])
        return self.store.to_device(as_written.permute([self._order.index(dim) for dim in range(len(self._order))]))


def _forget(path: Path, home: Home, size: int) -> None:
    path.unlink(missing_ok=True)
    home.release(size)
