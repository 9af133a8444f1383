"""Files that are complete or not there, and last through a power cut."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pruneforge.checkpoint.shards import as_bytes, header
from pruneforge.errors import UnfinishedError

PARTIAL = ".partial"


@contextmanager
def writing(folder: Path, what: str = "output folder") -> Iterator[None]:
    """Turn what the system says of a full or read-only disk into one line.

    Raises:
        UnfinishedError: Something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UnfinishedError(
            f"{what} {str(folder)!r} cannot be written: {error.strerror or error}; once it can, go on with `resume`"
        ) from error


@contextmanager
def open_for_writing(path: Path) -> Iterator[int]:
    """Open a file for reading and writing at any place, made if it is not there; yield its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(target: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset, however little the system takes at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done : done + (1 << 30)], offset + done)


def sync(folder: Path) -> None:
    """Make the small files of a folder, and their names, last through a power cut."""
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_size < 1 << 24:
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Make one file last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str = "folder") -> None:
    """Write a safetensors file, whole or not at all, without a second copy of its tensors.

    Args:
        path: The file.
        tensors: By name; those of larger dtypes first, so that all are aligned.
        metadata: What else the file says of itself.
        what: What its folder is to a user, for messages.

    Raises:
        UnfinishedError: The disk is full, or cannot be written.
    """
    head = header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two runs may share a cache
    with writing(path.parent, what):
        try:
            with open_for_writing(partial) as target:
                write_all(target, memoryview(head), 0)
                offset = len(head)
                for tensor in tensors.values():
                    data = as_bytes(tensor.cpu().contiguous()).numpy().data
                    write_all(target, data, offset)
                    offset += len(data)
                os.fsync(target)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a file that is complete or as it was before."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
