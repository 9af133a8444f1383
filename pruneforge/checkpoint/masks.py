"""Masks on disk, one bit per weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pruneforge.checkpoint.tensors import safetensors_header
from pruneforge.documents import parse_json
from pruneforge.errors import PruneForgeError

MASKS_FILE = "pruneforge.masks"
"""A file of safetensors under a name of its own: of a folder without an index engines load every `*.safetensors`."""

FORMER = "masks.safetensors"
"""What it was called up to 0.1."""

ORDER = ".permutation"
"""What follows a layer's name in the name of its permutation."""


def masks_header(shapes: Mapping[str, tuple[int, int]], permuted: bool) -> tuple[bytes, int]:
    """Return the header of a file of packed masks of `shapes`, by layer name, and the size in bytes of what follows.

    Args:
        shapes: Shape (out, in) of each mask.
        permuted: Whether the file holds a permutation of each layer's columns too.
    """
    orders = {name + ORDER: (torch.int32, (shape[1],)) for name, shape in shapes.items() if permuted}
    bits = {name: (torch.uint8, (packed_bytes(shape),)) for name, shape in shapes.items()}
    size = sum(count * dtype.itemsize for dtype, (count,) in [*orders.values(), *bits.values()])
    metadata = _metadata({name: list(shape) for name, shape in shapes.items()})
    return safetensors_header({**orders, **bits}, metadata), size


def packed_bytes(shape: tuple[int, int]) -> int:
    """Return the size in bytes of a packed mask [out, in]."""
    return -(-shape[0] * shape[1] // 8)


def pack(mask: Tensor) -> np.ndarray:
    """Pack a mask, boolean [out, in], row by row into bits, uint8 [packed_bytes]."""
    return np.packbits(mask.numpy().reshape(-1))


def packed(masks: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return what a file holds of masks [out, in] and permutations [in], both by layer name: its arrays, by name."""
    orders = {name + ORDER: order.numpy().astype(np.int32) for name, order in permutations.items()}
    return {**orders, **{name: pack(mask) for name, mask in masks.items()}}


def _metadata(shapes: Mapping[str, list[int]]) -> dict[str, str]:
    return {"shapes": json.dumps(shapes), "packing": "bits, most significant first"}


def save_masks(masks: Mapping[str, Tensor], folder: Path, permutations: Mapping[str, Tensor]) -> None:
    """Write masks, boolean [out, in], and permutations of columns [in], both by layer name, to `folder`."""
    (folder / MASKS_FILE).write_bytes(masks_file(masks, permutations))


def masks_file(masks: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file of masks, boolean [out, in], and permutations of columns [in], by layer name."""
    shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
    header, _ = masks_header(shapes, bool(permutations))  # the library's own orders the metadata at random
    return b"".join([header, *(array.tobytes() for array in packed(masks, permutations).values())])


def load_masks(path: Path) -> dict[str, Tensor]:
    """Read masks, boolean [out, in] by layer name.

    Args:
        path: The output of a pruning run, or the file of its masks.

    Raises:
        PruneForgeError: There are no masks, or their file is damaged.
    """
    with _opened(path) as (file, shapes):
        return {name: _unpacked(file, name, shape) for name, shape in shapes.items()}


def load_mask(path: Path, layer: str) -> Tensor:
    """Read the mask of one layer, boolean [out, in]; path and errors as for `load_masks`."""
    with _opened(path, layer) as (file, shapes):
        return _unpacked(file, layer, shapes[layer])


def load_permutations(path: Path, layer: str | None = None) -> dict[str, Tensor]:
    """Read the order of columns, int64 [in], in which masks fit N:M, by layer name; empty if it is their own.

    Args:
        path: The output of a pruning run, or the file of its masks.
        layer: The only layer to read, if not all.

    Raises:
        PruneForgeError: There are no masks, or their file is damaged.
    """
    with _opened(path, layer) as (file, shapes):
        there = set(file.keys())
        asked = shapes if layer is None else [layer]
        return {name: torch.from_numpy(file.get_tensor(name + ORDER)).long() for name in asked if name + ORDER in there}


def mask_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Read the shape (out, in) of each mask, by layer name; path and errors as for `load_masks`."""
    with _opened(path) as (_, shapes):
        return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def _unpacked(file: Any, name: str, shape: Sequence[int]) -> Tensor:
    bits = np.unpackbits(file.get_tensor(name), count=int(np.prod(shape)))
    return torch.from_numpy(bits).bool().view(*shape)


def file_of(path: Path) -> Path:
    """Return the file of masks that `path` is or, as a folder, holds; there need not be one."""
    if not path.is_dir():
        return path
    former = path / FORMER
    return former if former.is_file() and not (path / MASKS_FILE).exists() else path / MASKS_FILE


@contextmanager
def _opened(path: Path, layer: str | None = None) -> Iterator[tuple[Any, dict[str, list[int]]]]:
    """Open a file of masks, with the shape of each, by layer name, for those of all layers or of one."""
    path, asked = file_of(path), path
    if not path.is_file():
        raise PruneForgeError(f"{str(asked)!r} holds no {MASKS_FILE}; it is not the output of a pruning run")
    try:
        with safe_open(path, "numpy") as file:
            yield file, _shapes(file, f"{str(path)!r}", layer)
    except (SafetensorError, KeyError, OSError) as error:
        raise PruneForgeError(f"{str(path)!r} is damaged: {error}") from error


def _shapes(file: Any, what: str, layer: str | None) -> dict[str, list[int]]:
    """Return the shape of each mask of an open file; only that of `layer`, if one is named, is checked.

    Raises:
        KeyError: There is no mask of the layer.
        PruneForgeError: They do not fit what the file holds.
    """
    shapes = parse_json((file.metadata() or {}).get("shapes", ""), f"{what}: its list of shapes")
    if not isinstance(shapes, dict) or not shapes:
        raise PruneForgeError(f"{what} is damaged: it does not list the masks' shapes")
    there = set(file.keys())
    for name, shape in shapes.items() if layer is None else [(layer, shapes[layer])]:
        sizes = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
        if not sizes or name not in there or not _holds(file, name, "U8", [packed_bytes((shape[0], shape[1]))]):
            raise PruneForgeError(f"{what} is damaged: it holds no mask of shape {shape} for {name!r}")
        if name + ORDER in there and not _holds(file, name + ORDER, "I32", shape[1:]):
            raise PruneForgeError(f"{what} is damaged: the permutation of {name!r} does not fit its mask")
    return shapes


def _holds(file: Any, name: str, dtype: str, shape: list[int]) -> bool:
    """Return whether a tensor of an open file has a dtype and a shape."""
    found = file.get_slice(name)
    return found.get_dtype() == dtype and found.get_shape() == shape
