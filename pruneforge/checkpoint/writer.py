"""Write a checkpoint block by block, into files that have their final size from the start.

A file is called `NAME.partial` until the run is finished. A weight file starts as a copy of the original without the
tensors that will change; these are written to their places when their block is finished.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pruneforge.checkpoint import masks
from pruneforge.checkpoint.durable import PARTIAL, open_for_writing, sync, write_all, writing
from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.checkpoint.tensors import TensorLocation, as_bytes, read_header, read_tensor
from pruneforge.errors import PruneForgeError


class Rewrite:
    """A copy of a checkpoint in which some tensors change, with the masks of its layers."""

    def __init__(
        self,
        source: Checkpoint,
        folder: Path,
        layers: Mapping[str, tuple[TensorLocation, tuple[int, int]]],
        others: Sequence[TensorLocation] = (),
        permuted: bool = False,
    ) -> None:
        """Describe the files; nothing is written yet.

        Args:
            source: The checkpoint to copy.
            folder: The folder to write to.
            layers: Location of each layer's tensor, and the shape of its mask (out, in), by layer name.
            others: Locations of further tensors that change.
            permuted: Whether a permutation of each layer's columns is kept too.
        """
        self.source = source
        self.folder = folder
        self._layers = dict(layers)
        self._changing = {location.name for location in [*(location for location, _ in layers.values()), *others]}
        self._head, self._kept = masks.masks_header({name: shape for name, (_, shape) in layers.items()}, permuted)
        self._places: dict[str, TensorLocation] = {}

    def bytes_needed(self) -> int:
        """Return the size in bytes of the finished folder."""
        weights = sum((self.source.folder / file).stat().st_size for file in self.source.files)
        others = sum(path.stat().st_size for path in self.source.companions())
        return weights + others + len(self._head) + self._kept

    def prepare(self) -> None:
        """Create every file at its full size, with everything that does not change.

        Raises:
            UnfinishedError: The disk is full or cannot be written.
        """
        with writing(self.folder):
            free = shutil.disk_usage(self.folder).free
            # Blocks that an interrupted run has reserved already.
            there = sum(path.stat().st_blocks * 512 for path in self.folder.glob(f"*{PARTIAL}"))
            if self.bytes_needed() > free + there:
                raise OSError(errno.ENOSPC, f"{self.bytes_needed():,} bytes are needed and {free + there:,} are free")
            for file in self.source.files:
                self._lay_out(file)
            with open_for_writing(self.folder / (masks.MASKS_FILE + PARTIAL)) as target:
                _reserve(target, len(self._head) + self._kept)
                os.pwrite(target, self._head, 0)
                os.fsync(target)
            sync(self.folder)

    def _lay_out(self, file: str) -> None:
        """Create one weight file with everything but the tensors that will change."""
        tensors = [location for location in self.source.tensors.values() if location.file == file]
        changing = sorted((t for t in tensors if t.name in self._changing), key=lambda t: t.start)
        size = (self.source.folder / file).stat().st_size
        with (
            open(self.source.folder / file, "rb", buffering=0) as original,
            open_for_writing(self._partial(file)) as target,
        ):
            _reserve(target, size)
            start = 0
            for location in changing:
                _copy(original.fileno(), target, start, location.start)
                start = location.start + location.size
            _copy(original.fileno(), target, start, size)
            os.fsync(target)

    def write(
        self, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor], permutations: Mapping[str, Tensor]
    ) -> None:
        """Write finished layers, flushed to the disk when this returns.

        Args:
            tensors: The changed tensors, by name, in the checkpoint's dtype.
            kept: Masks, boolean [out, in], by layer name.
            permutations: Order of the columns [in], by layer name, if these are kept.

        Raises:
            UnfinishedError: The disk is full or cannot be written.
        """
        with writing(self.folder):
            # By file, so that each is opened and flushed once.
            touched: dict[Path, list[tuple[int, memoryview]]] = {}
            for name, tensor in tensors.items():
                location = self.source.tensors[name]
                place = touched.setdefault(self._partial(location.file), [])
                place.append((location.start, as_bytes(tensor.cpu()).numpy().data))
            partial = self.folder / (masks.MASKS_FILE + PARTIAL)
            if not self._places:
                self._places = {location.name: location for location in read_header(partial)}
            arrays = masks.packed(kept, permutations)
            packed = [(self._places[name].start, array.data.cast("B")) for name, array in arrays.items()]
            for path, parts in [*touched.items(), (partial, packed)]:
                with open_for_writing(path) as target:
                    for offset, data in parts:
                        write_all(target, data, offset)
                    os.fsync(target)

    def changes(self, name: str) -> bool:
        """Return whether a tensor is among those that change."""
        return name in self._changing

    def read(self, name: str) -> Tensor:
        """Return a changed tensor, as `write` wrote it in this process or an earlier one."""
        location = self.source.tensors[name]
        return read_tensor(self._partial(location.file), location)

    def names(self, own: Collection[str]) -> list[str]:
        """Return the names of the finished folder's files; `own` are those not to copy."""
        companions = [path.name for path in self.source.companions() if path.name not in own]
        return [*self.source.files, masks.MASKS_FILE, *companions]

    def finish(self, own: Collection[str], target: Path | None = None) -> None:
        """Rename every file to its final name, and copy the checkpoint's other files.

        Args:
            own: Names of files not to copy.
            target: Folder for all of them, on the same disk; by default the folder that they were written to.

        Raises:
            PruneForgeError: Somebody removed a file.
            UnfinishedError: The disk is full or cannot be written.
        """
        target = target or self.folder
        self.check_there([target])
        with writing(self.folder):
            target.mkdir(exist_ok=True)
            for file in [*self.source.files, masks.MASKS_FILE]:
                partial = self.folder / (file + PARTIAL)
                if partial.exists():  # a run that was stopped here has renamed some files already
                    read_header(partial)  # as the libraries will
                    partial.replace(target / file)
            # The configuration comes last: without it no library takes the folder for a model.
            for path in sorted(self.source.companions(), key=lambda path: path.name == "config.json"):
                if path.name not in own:
                    copy = target / (path.name + PARTIAL)
                    shutil.copyfile(path, copy)
                    copy.replace(target / path.name)
            sync(target)

    def check_there(self, complete: Sequence[Path]) -> None:
        """Raise unless each file is there: unfinished, or under its final name in one of some folders.

        Raises:
            PruneForgeError: Naming the one that somebody removed.
        """
        for file in [*self.source.files, masks.MASKS_FILE]:
            if not self._partial(file).is_file() and not any((folder / file).is_file() for folder in complete):
                raise PruneForgeError(
                    f"{file + PARTIAL!r} was removed from {str(self.folder)!r} while it was being written; empty the "
                    "folder and start again"
                )

    def _partial(self, file: str) -> Path:
        return self.folder / (file + PARTIAL)


def _reserve(target: int, size: int) -> None:
    """Give a file its size, and allocate its blocks where the system can."""
    # Allocated now, a full disk shows before hours of work and not in the middle of a block.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size)
    os.ftruncate(target, size)


def _copy(source: int, target: int, start: int, stop: int) -> None:
    """Copy bytes `start` to `stop` between two open files, at the same offsets."""
    while start < stop:
        chunk = os.pread(source, min(stop - start, 1 << 24), start)
        if not chunk:
            raise OSError(errno.EIO, "the original became shorter while it was read")
        write_all(target, memoryview(chunk), start)
        start += len(chunk)
