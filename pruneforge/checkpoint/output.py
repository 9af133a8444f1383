"""The output folder: complete, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruneforge.errors import PruneForgeError


def check_output(folder: Path) -> None:
    """Raise unless `folder` can be written: absent or empty, below a folder that takes new files.

    Raises:
        PruneForgeError: Naming the folder.
    """
    if folder.is_file():
        raise PruneForgeError(f"output {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise PruneForgeError(f"output folder {str(folder)!r} is not empty; name another or empty it first")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise PruneForgeError(f"output folder {str(folder)!r} cannot be made: {str(parent)!r} is not writable")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its place when the context ends well, and vanishes otherwise."""
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise PruneForgeError(f"output folder {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
