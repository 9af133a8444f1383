"""Write files that are complete or absent, and survive a power cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pruneforge.checkpoint.tensors import as_bytes, safetensors_header
from pruneforge.errors import UnfinishedError

PARTIAL = ".partial"
"""Ending of a file's name while the file is being written."""


@contextmanager
def writing(folder: Path, what: str = "output folder") -> Iterator[None]:
    """Convert `OSError` within the context into `UnfinishedError`.

    Args:
        folder: The folder that is written to.
        what: What the message calls it.

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
    """Open a file for reading and writing at any offset, creating it if needed; yield its descriptor."""
    # Not truncated: files are filled in place by several calls.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(target: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset."""
    done = 0  # the system may write less than asked for, and never more than 2 GiB at a time
    while done < len(data):
        done += os.pwrite(target, data[done : done + (1 << 30)], offset + done)


def sync(folder: Path) -> None:
    """Flush the files of a folder, and its list of names, to the disk; those flushed before cost next to nothing."""
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush one file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str = "folder") -> None:
    """Write a safetensors file, completely or not at all, without a second copy of its tensors.

    Args:
        path: The file.
        tensors: Tensors by name; larger dtypes first, so that all are aligned.
        metadata: The file's metadata.
        what: What error messages call its folder.

    Raises:
        UnfinishedError: The disk is full or cannot be written.
    """
    head = safetensors_header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
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
                os.fsync(target)  # before the file gets its name, or a power cut could leave the name without the data
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically: it is complete, or as it was before."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file atomically: it is complete, or as it was before."""
    # Not named by the process alone: processes of several machines may share a folder.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    partial = Path(name)
    try:
        os.fchmod(descriptor, 0o666 & ~_umask())
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """Return which permissions the user denies to new files."""
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask
