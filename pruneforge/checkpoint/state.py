"""The state of training that an interrupted run goes on from, in a file that is whole or absent."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pruneforge.checkpoint.durable import PARTIAL, write_bytes, writing
from pruneforge.errors import PruneForgeError

STATE_FILE = "recovery.state"


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state, or replace the one that is there.

    Args:
        state: Tensors, numbers and texts in dictionaries and lists.
        path: The file.

    Raises:
        UnfinishedError: The disk is full or cannot be written.
    """
    content = io.BytesIO()
    torch.save(dict(state), content)
    with writing(path.parent):
        write_bytes(content.getvalue(), path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Return the state in a file, with its tensors on the CPU, or `None` if there is no file.

    Raises:
        PruneForgeError: The file is damaged, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PruneForgeError(f"{str(path)!r} is damaged: {reason}; empty the folder and start again") from error
    return state


def forget_state(path: Path) -> None:
    """Remove a state, and what a process that was killed had written of one."""
    for file in [path, *path.parent.glob(f".{path.name}.*{PARTIAL}")]:
        file.unlink(missing_ok=True)
