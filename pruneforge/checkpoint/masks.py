"""Masks on disk, one bit per weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from pruneforge.checkpoint import reader
from pruneforge.errors import PruneForgeError

MASKS_FILE = "masks.safetensors"


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
    return reader.safetensors_header({**orders, **bits}, metadata), size


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
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return save(packed(masks, permutations), metadata=_metadata(shapes))


def load_masks(folder: Path) -> dict[str, Tensor]:
    """Read masks from `folder`, boolean [out, in] by layer name.

    Raises:
        PruneForgeError: The folder has no masks, or their file is damaged.
    """
    with _opened(folder) as (file, shapes):
        return {
            name: torch.from_numpy(np.unpackbits(file.get_tensor(name), count=int(np.prod(shape)))).bool().view(shape)
            for name, shape in shapes.items()
        }


def load_permutations(folder: Path) -> dict[str, Tensor]:
    """Read the order of columns, int64 [in], in which masks fit N:M, by layer name; empty if it is their own.

    Raises:
        PruneForgeError: The folder has no masks, or their file is damaged.
    """
    with _opened(folder) as (file, shapes):
        there = set(file.keys())
        return {
            name: torch.from_numpy(file.get_tensor(name + ORDER)).long() for name in shapes if name + ORDER in there
        }


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Any, dict[str, list[int]]]]:
    """Open the file of masks in `folder`, with the shape of each, by layer name."""
    path = folder / MASKS_FILE
    if not path.is_file():
        raise PruneForgeError(f"{str(folder)!r} holds no {MASKS_FILE}; it is not the output of a pruning run")
    try:
        with safe_open(path, "numpy") as file:
            yield file, json.loads(file.metadata()["shapes"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise PruneForgeError(f"{str(path)!r} is damaged: {error}") from error
