"""Create an output folder that is complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pruneforge.errors import PruneForgeError


def check_output(folder: Path) -> None:
    """Raise unless `folder` is absent or empty, and can be written.

    Raises:
        PruneForgeError: Naming the folder.
    """
    target = folder.resolve()
    if target.is_file():
        raise PruneForgeError(f"output {str(folder)!r} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise PruneForgeError(f"output folder {str(folder)!r} is not empty; name another or empty it first")
    above = next(path for path in [target, *target.parents] if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PruneForgeError(
            f"output folder {str(folder)!r} cannot be made: {str(above)!r} is not a folder that can be written to"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill; it becomes `folder` at the end, or is removed if there was an error.

    Raises:
        PruneForgeError: The folder cannot be written.
    """
    check_output(folder)
    target = folder.resolve()
    # An existing empty folder may be a mount point: it is filled, not replaced.
    inside = target.is_dir()
    # Beside its target, so that renaming stays within one file system.
    partial = (target if inside else target.parent) / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if inside:
            for path in partial.iterdir():
                path.rename(target / path.name)
        else:
            partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise PruneForgeError(f"output folder {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
