"""Masks on disk, one bit per weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from pruneforge.checkpoint import reader
from pruneforge.errors import PruneForgeError

MASKS_FILE = "masks.safetensors"


def masks_header(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the header of a file of packed masks of `shapes`, by layer name."""
    packed = {name: (torch.uint8, (packed_bytes(shape),)) for name, shape in shapes.items()}
    return reader.safetensors_header(packed, _metadata({name: list(shape) for name, shape in shapes.items()}))


def packed_bytes(shape: tuple[int, int]) -> int:
    """Return the size in bytes of a packed mask [out, in]."""
    return -(-shape[0] * shape[1] // 8)


def pack(mask: Tensor) -> np.ndarray:
    """Pack a mask, boolean [out, in], row by row into bits, uint8 [packed_bytes]."""
    return np.packbits(mask.numpy().reshape(-1))


def _metadata(shapes: Mapping[str, list[int]]) -> dict[str, str]:
    return {"shapes": json.dumps(shapes), "packing": "bits, most significant first"}


def save_masks(masks: Mapping[str, Tensor], folder: Path) -> None:
    """Write masks, boolean [out, in] by layer name, to `folder`."""
    (folder / MASKS_FILE).write_bytes(masks_file(masks))


def masks_file(masks: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file of masks, boolean [out, in] by layer name."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return save({name: pack(mask) for name, mask in masks.items()}, metadata=_metadata(shapes))


def load_masks(folder: Path) -> dict[str, Tensor]:
    """Read masks from `folder`, boolean [out, in] by layer name.

    Raises:
        PruneForgeError: The folder has no masks, or their file is damaged.
    """
    path = folder / MASKS_FILE
    if not path.is_file():
        raise PruneForgeError(f"{str(folder)!r} holds no {MASKS_FILE}; it is not the output of a pruning run")
    try:
        with safe_open(path, "numpy") as file:
            shapes: dict[str, list[int]] = json.loads(file.metadata()["shapes"])
            return {
                name: torch.from_numpy(np.unpackbits(file.get_tensor(name), count=int(np.prod(shape))))
                .bool()
                .view(shape)
                for name, shape in shapes.items()
            }
    except (SafetensorError, KeyError, ValueError) as error:
        raise PruneForgeError(f"{str(path)!r} is damaged: {error}") from error
