"""Checkpoints of safetensors files, read tensor by tensor.

A tensor is read straight from its place in the file into the memory that the model will use. The files are not
memory-mapped: a page that cannot be read would then end the process by a signal instead of an error, and pages
of a finished block would count as the process's own until the kernel takes them back.
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
"""Dtypes by their names in the files."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Stored:
    """Where one tensor stands.

    Attributes:
        name: Its name.
        file: Name of the file.
        dtype: Its dtype there.
        shape: Its shape.
        start: Its first byte, counted from the start of the file.
        size: How many bytes it has.
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
        folder: The folder; it is never written to.
        files: Names of its weight files.
        index: Name of the file that says which tensor stands where, or `None` if there is one weight file.
        tensors: Every tensor, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index and every file's header.

        Raises:
            PruneForgeError: The folder holds no such checkpoint, or a file is missing, truncated or damaged.
        """
        self.folder = folder
        # Of a single file and an index the libraries take the single file.
        self.index = INDEX if (folder / INDEX).is_file() and not (folder / SINGLE).is_file() else None
        listed = _index(folder / INDEX) if self.index else None
        self.files = sorted(set(listed.values())) if listed is not None else [SINGLE]
        missing = [name for name in self.files if not (folder / name).is_file()]
        if missing and self.index:
            raise PruneForgeError(f"{INDEX} in {str(folder)!r} names {missing[0]!r}, and there is no such file")
        if missing:
            raise PruneForgeError(f"{str(folder)!r} holds no {SINGLE} and no {INDEX}")
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for stored in read_header(folder / file):
                if listed is None or listed.get(stored.name) == file:
                    self.tensors[stored.name] = stored
        lost = sorted(set(listed or ()) - set(self.tensors))
        if lost and listed:
            raise PruneForgeError(f"{INDEX} places {lost[0]!r} in {listed[lost[0]]!r}, and it does not stand there")

    def read(self, stored: Stored, pinned: bool = False) -> Tensor:
        """Return a tensor, as it is stored, in memory of its own.

        Args:
            stored: Which.
            pinned: Whether a CUDA device is to copy from that memory by itself.

        Raises:
            UnfinishedError: The file cannot be read, or has become shorter.
        """
        return read_tensor(self.folder / stored.file, stored, pinned)

    def fingerprint(self) -> str:
        """Return a hash of the configuration, and of every tensor's name, dtype, shape and bytes.

        Bytes go through CRC-32, which tells models apart and is no seal: it reads at the speed of a good disk.

        Raises:
            UnfinishedError: A file cannot be read.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        ordered = sorted(self.tensors.values(), key=lambda stored: stored.name)
        try:
            digest.update(config.read_bytes() if config.exists() else b"")
            with ThreadPoolExecutor() as threads:
                for stored, checksum in zip(ordered, threads.map(self._checksum, ordered), strict=True):
                    digest.update(f"{stored.name}{stored.dtype}{stored.shape}{checksum}".encode())
        except OSError as error:
            raise UnfinishedError(f"{str(self.folder)!r} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def _checksum(self, stored: Stored) -> int:
        checksum = 0
        with open(self.folder / stored.file, "rb", buffering=0) as file:
            for start in range(stored.start, stored.start + stored.size, _CHUNK):
                part = os.pread(file.fileno(), min(_CHUNK, stored.start + stored.size - start), start)
                checksum = zlib.crc32(part, checksum)
        return checksum

    def companions(self) -> list[Path]:
        """Return the folder's other files: configuration, tokenizer, index; no weights in other formats."""
        weights = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json"}
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and (path.name == self.index or not any(path.name.endswith(suffix) for suffix in weights))
        ]


def read_header(path: Path) -> list[Stored]:
    """Return the tensors of a safetensors file, in the order they stand.

    Raises:
        PruneForgeError: The file is damaged, shorter than its header says, or holds an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise PruneForgeError(f"{str(path)!r} is truncated: it ends within its header")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = [
            Stored(
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
    for stored in found:
        if stored.start + stored.size > size:
            missing = stored.start + stored.size - size
            raise PruneForgeError(
                f"{str(path)!r} is truncated: tensor {stored.name!r} ends {missing:,} bytes behind its end"
            )
        if prod(stored.shape) * stored.dtype.itemsize != stored.size:
            raise PruneForgeError(f"{str(path)!r} is damaged: tensor {stored.name!r} has {stored.size:,} bytes")
    return sorted(found, key=lambda stored: stored.start)


def read_tensor(path: Path, stored: Stored, pinned: bool = False) -> Tensor:
    """Return a tensor of a file; see `Checkpoint.read`."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pinned)
    if not stored.size:
        return tensor
    target = as_bytes(tensor).numpy().data
    try:
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < stored.size:
                count = os.preadv(file.fileno(), [target[done : done + (1 << 30)]], stored.start + done)
                if not count:
                    raise UnfinishedError(f"{str(path)!r} became shorter: it ends within tensor {stored.name!r}")
                done += count
    except OSError as error:
        raise UnfinishedError(
            f"{str(path)!r} cannot be read: {error.strerror}; once it can, go on with `resume`"
        ) from error
    return tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as bytes [n] uint8."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file that will hold `tensors` in the order they come.

    Args:
        tensors: Dtype and shape of each, by name; those of larger dtypes first, so that all are aligned.
        metadata: What else the file says of itself.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise ValueError("its weight_map is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PruneForgeError(f"index {str(path)!r} is damaged: {error}") from error
    for file in listed.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise PruneForgeError(f"index {str(path)!r} names {file!r}, which is no file of the folder")
    return listed
