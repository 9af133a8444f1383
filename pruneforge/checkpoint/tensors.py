"""Files of safetensors: their headers, and tensors at their places.

A tensor is read from its place in the file directly into the memory that the model will use. The files are not
memory-mapped: an unreadable page would then kill the process by a signal instead of raising an error, and pages of a
finished block would count as the process's memory until the kernel reclaims them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pruneforge.documents import parse_json, regular_file
from pruneforge.errors import PruneForgeError, UnfinishedError

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

LONGEST_HEADER = 100_000_000
"""Bytes of a header that the safetensors library reads."""


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


def read_header(path: Path) -> list[TensorLocation]:
    """Return the locations of a safetensors file's tensors, in file order.

    What the safetensors library refuses is refused: offsets that overlap or leave gaps, bytes after the last tensor,
    metadata that are not text.

    Raises:
        PruneForgeError: The file is damaged, shorter than its header says, or has an unknown dtype.
    """
    size = regular_file(path, "weight file").stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise PruneForgeError(f"{str(path)!r} is truncated: it ends within its header")
            if length > LONGEST_HEADER:
                raise PruneForgeError(f"{str(path)!r} is damaged: its header has {length:,} bytes")
            header = file.read(length)
        locations = _locations(path.name, parse_json(header.decode(), f"the header of {str(path)!r}"), 8 + length)
    except KeyError as error:
        raise PruneForgeError(f"{str(path)!r} holds a dtype that cannot be pruned: {error}") from error
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise PruneForgeError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    for location in locations:
        missing = location.start + location.size - size
        if missing > 0:
            raise PruneForgeError(
                f"{str(path)!r} is truncated: tensor {location.name!r} ends {missing:,} bytes after the end of the file"
            )
    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise PruneForgeError(f"{str(path)!r} is damaged: {error}") from error
    return locations


def _locations(file: str, entries: dict[str, dict[str, Any]], first: int) -> list[TensorLocation]:
    """Return the locations that a header's entries describe, with the file's first tensor at byte `first`."""
    locations = [
        TensorLocation(
            name,
            file,
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            first + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
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
