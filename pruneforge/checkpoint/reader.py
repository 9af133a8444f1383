"""Read checkpoints of safetensors files tensor by tensor."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pruneforge.checkpoint.durable import PARTIAL
from pruneforge.checkpoint.tensors import TensorLocation, read_header, read_tensor
from pruneforge.documents import read_json
from pruneforge.errors import PruneForgeError, UnfinishedError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_CHUNK = 1 << 22
_PART = 1 << 26
"""Bytes of a piece of a tensor, a multiple of the size of every dtype."""


class Checkpoint:
    """The tensors of a folder of safetensors files.

    Attributes:
        folder: The folder, which is never written to.
        files: Names of the weight files.
        index: Name of the index file, which maps tensors to files, or `None` if there is one weight file.
        tensors: Location of every tensor, by name.
        prefix: What parameters' names may have before the tensors' names.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """Read the index and the header of every file.

        Args:
            folder: The folder.
            prefix: What parameters' names may have before the tensors' names.

        Raises:
            PruneForgeError: The folder has no such checkpoint, or a file is missing, truncated or damaged, or a
                link out of the folder.
        """
        check_within(folder)
        self.folder = folder
        self.prefix = prefix
        # Given both a single file and an index, the libraries load the single file.
        self.index = INDEX if (folder / INDEX).is_file() and not (folder / SINGLE).is_file() else None
        listed = _index(folder / INDEX) if self.index else None
        self.files = sorted(set(listed.values())) if listed is not None else [SINGLE]
        there = {path.name for path in folder.iterdir() if path.is_file()}
        missing = [name for name in self.files if name not in there]
        if missing and self.index:
            raise PruneForgeError(f"{INDEX} in {str(folder)!r} names {missing[0]!r}, which does not exist")
        if missing:
            raise PruneForgeError(f"{str(folder)!r} holds no {SINGLE} and no {INDEX}")
        self.tensors: dict[str, TensorLocation] = {}
        for file in self.files:
            for location in read_header(folder / file):
                if listed is None or listed.get(location.name) == file:
                    self.tensors[location.name] = location
        lost = sorted(set(listed or ()) - set(self.tensors))
        if lost and listed:
            raise PruneForgeError(f"{INDEX} places {lost[0]!r} in {listed[lost[0]]!r}, which does not contain it")

    def find(self, name: str) -> TensorLocation | None:
        """Return the location of a parameter's or buffer's tensor, or `None`."""
        return self.tensors.get(name) or self.tensors.get(name.removeprefix(self.prefix))

    def read(self, location: TensorLocation, pinned: bool = False) -> Tensor:
        """Return a tensor on the CPU, in the dtype of the file.

        Args:
            location: The tensor's location.
            pinned: Read into pinned memory, for asynchronous copies to a CUDA device.

        Raises:
            UnfinishedError: The file cannot be read or has become shorter.
        """
        return read_tensor(self.folder / location.file, location, pinned)

    def parts(self, location: TensorLocation) -> Iterator[Tensor]:
        """Yield a tensor's values in pieces [n], in order, so that the largest tensor takes little memory.

        Args:
            location: The tensor's location.

        Raises:
            UnfinishedError: The file cannot be read or has become shorter.
        """
        for start in range(0, location.size, _PART):
            size = min(_PART, location.size - start)
            values = (size // location.dtype.itemsize,)
            yield self.read(replace(location, shape=values, start=location.start + start, size=size))

    def fingerprint(self) -> str:
        """Return a hash of the configuration and of every tensor's name, dtype, shape and bytes.

        Bytes are hashed with CRC-32, which keeps up with a fast disk. It tells models apart, but does not protect
        against deliberate changes.

        Raises:
            UnfinishedError: A file cannot be read.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        ordered = sorted(self.tensors.values(), key=lambda location: location.name)
        try:
            digest.update(config.read_bytes() if config.exists() else b"")
            with ThreadPoolExecutor() as threads:
                for location, checksum in zip(ordered, threads.map(self._checksum, ordered), strict=True):
                    digest.update(f"{location.name}{location.dtype}{location.shape}{checksum}".encode())
        except OSError as error:
            raise UnfinishedError(f"{str(self.folder)!r} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def _checksum(self, location: TensorLocation) -> int:
        """Return the CRC-32 of a tensor's bytes."""
        checksum = 0
        with open(self.folder / location.file, "rb", buffering=0) as file:
            for start in range(location.start, location.start + location.size, _CHUNK):
                part = os.pread(file.fileno(), min(_CHUNK, location.start + location.size - start), start)
                checksum = zlib.crc32(part, checksum)
        return checksum

    def companions(self) -> list[Path]:
        """Return the folder's other files (configuration, tokenizer, index), without weights in other formats."""
        return [path for path in self._others() if path.is_file() and (path.name == self.index or not _weights(path))]

    def left_out(self) -> list[Path]:
        """Return what the folder holds besides its weights and their companions: folders, and other weights."""
        taken = set(self.companions())
        return [path for path in self._others() if path not in taken]

    def _others(self) -> list[Path]:
        """Return what is in the folder besides the weights that are read."""
        paths = sorted(self.folder.iterdir())
        return [path for path in paths if path.name not in self.files and not path.name.startswith(".")]


def _weights(path: Path) -> bool:
    """Return whether a file holds weights, or is an index of them, or bears the name of one that is being written."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json", PARTIAL)
    return path.name.endswith(weights)


def check_within(folder: Path) -> None:
    """Raise if something in a model's folder leads out of it: a link, or a name in an index or the configuration.

    What it leads to would be read, and copied as a file of the model. The links of the Hub's cache lead to its own
    files, and are allowed. Pipes and devices are refused too.

    Raises:
        PruneForgeError: Naming it.
    """
    home = folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else None
    for path in _paths(folder):
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # leads nowhere, or in a circle
            continue
        if not (target.is_relative_to(home) or target.parent == blobs):
            raise PruneForgeError(
                f"{str(path)!r} is a link out of the model's folder, to {str(target)!r}; copy the file in its place"
            )
        if not (target.is_file() or target.is_dir()):
            raise PruneForgeError(f"{str(path)!r} is not a regular file; remove it from the model's folder")
    for path in _paths(folder):
        if path.name.endswith(".index.json"):
            _check_names(path, "weight_map")
    _check_names(folder / "config.json", "transformers_weights")


def _paths(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and in those below it, but for hidden ones, which no library reads."""
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *files]:
            yield Path(base, name)


def _check_names(path: Path, key: str) -> None:
    """Raise if a JSON file names a path under `key`, where names of files in the same folder belong.

    A file that is not as expected is left to whoever needs it.

    Raises:
        PruneForgeError: Naming the path.
    """
    try:
        content = read_json(path, "file")
    except PruneForgeError:
        return
    found = content.get(key) if isinstance(content, dict) else None
    for name in found.values() if isinstance(found, dict) else [found]:
        if isinstance(name, str) and Path(name).name != name:
            raise PruneForgeError(f"{str(path)!r} names {name!r}, which is not the name of a file in the folder")


def _index(path: Path) -> dict[str, str]:
    """Read an index: the file name of each tensor, by tensor name."""
    content = read_json(path, "index")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise PruneForgeError(f"index {str(path)!r} is damaged: its weight_map is empty")
    for file in listed.values():
        # Paths are refused: an index must not make us read or write outside the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise PruneForgeError(
                f"index {str(path)!r} names {file!r}, which is not the name of a safetensors file in the folder"
            )
    return listed
