"""Read checkpoints of safetensors files tensor by tensor.

A tensor is read from its place in the file directly into the memory that the model will use. The files are not
memory-mapped: an unreadable page would then kill the process by a signal instead of raising an error, and pages of a
finished block would count as the process's memory until the kernel reclaims them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pruneforge.errors import PruneForgeError, UnfinishedError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their safetensors names."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorLocation:
    """Location of a tensor in a safetensors file.

    Attributes:
        name: Name of the tensor.
        file: Name of the file.
        dtype: Dtype in the file.
        shape: Shape of the tensor.
        start: Offset of its first byte from the start of the file.
        size: Size in bytes.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


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
            PruneForgeError: The folder has no such checkpoint, or a file is missing, truncated or damaged.
        """
        self.folder = folder
        self.prefix = prefix
        # Given both a single file and an index, the libraries load the single file.
        self.index = INDEX if (folder / INDEX).is_file() and not (folder / SINGLE).is_file() else None
        listed = _index(folder / INDEX) if self.index else None
        self.files = sorted(set(listed.values())) if listed is not None else [SINGLE]
        missing = [name for name in self.files if not (folder / name).is_file()]
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
        weights = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json"}
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and (path.name == self.index or not any(path.name.endswith(suffix) for suffix in weights))
        ]


def read_header(path: Path) -> list[TensorLocation]:
    """Return the locations of a safetensors file's tensors, in file order.

    Raises:
        PruneForgeError: The file is damaged, shorter than its header says, or has an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise PruneForgeError(f"{str(path)!r} is truncated: it ends within its header")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        locations = [
            TensorLocation(
                name,
                path.name,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        ]
    except KeyError as error:
        raise PruneForgeError(f"{str(path)!r} holds a dtype that cannot be pruned: {error}") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PruneForgeError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    for location in locations:
        if location.start + location.size > size:
            missing = location.start + location.size - size
            raise PruneForgeError(
                f"{str(path)!r} is truncated: tensor {location.name!r} ends {missing:,} bytes after the end of the file"
            )
        if prod(location.shape) * location.dtype.itemsize != location.size:
            raise PruneForgeError(f"{str(path)!r} is damaged: tensor {location.name!r} has {location.size:,} bytes")
    return sorted(locations, key=lambda location: location.start)


def read_tensor(path: Path, location: TensorLocation, pinned: bool = False) -> Tensor:
    """Read one tensor of a file; see `Checkpoint.read`."""
    tensor = torch.empty(location.shape, dtype=location.dtype, pin_memory=pinned)
    if not location.size:
        return tensor
    target = as_bytes(tensor).numpy().data
    try:
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < location.size:
                # The system may read less than asked for, and never more than 2 GiB at a time.
                count = os.preadv(file.fileno(), [target[done : done + (1 << 30)]], location.start + done)
                if not count:
                    raise UnfinishedError(f"{str(path)!r} became shorter: it ends within tensor {location.name!r}")
                done += count
    except OSError as error:
        raise UnfinishedError(
            f"{str(path)!r} cannot be read: {error.strerror}; once it can, go on with `resume`"
        ) from error
    return tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """View the memory of a contiguous tensor as bytes, uint8 [n]."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the header of a safetensors file that will hold `tensors` in the given order.

    Args:
        tensors: Dtype and shape of each tensor, by name; larger dtypes first, so that all are aligned.
        metadata: The file's metadata.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format pads the header, so that tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _index(path: Path) -> dict[str, str]:
    """Read an index: the file name of each tensor, by tensor name."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise ValueError("its weight_map is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PruneForgeError(f"index {str(path)!r} is damaged: {error}") from error
    for file in listed.values():
        # Paths are refused: an index must not make us read or write outside the folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise PruneForgeError(f"index {str(path)!r} names {file!r}, which is not the name of a file in the folder")
    return listed
