"""The folder of a study: what its cells have found, each file whole or not there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.durable import write_bytes, writing
from pruneforge.checkpoint.masks import file_of
from pruneforge.documents import read_json
from pruneforge.errors import PruneForgeError
from pruneforge.studies.plan import Cell

CELL_FILE = "cell.json"
"""What a cell found; the cell is finished once it is there, since it is written last."""

MEASURED_FILE = "measured.json"
"""What differs between two runs of a cell: times and memory."""

LOCK = ".lock"
"""Name of the file that processes hold locked while they look for what others left."""

WORK, LOCK_FILE = ".work-", "lock"
"""Beginning of the names of folders that processes work in, and the file in each that its process holds locked."""


class StudyFolder:
    """The folder of a study: `study.yaml`, `cells/`, `dense/`, and what is made of them.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a finished or failed cell found, or `None`."""
        return _read(self.path / place_of(cell, CELL_FILE))

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Return the times and the memory of a finished cell."""
        return _read(self.path / place_of(cell, MEASURED_FILE)) or {}

    def items(self, cell: Cell, task: int) -> dict[str, Any] | None:
        """Return a cell's outcome of each image or question of a task, or `None`; see `items_file`."""
        return _read(self.path / place_of(cell, items_file(task)))

    def masks(self, cell: Cell) -> Path:
        """Return the file of a cell's masks, which there may be."""
        return file_of((self.path / place_of(cell, CELL_FILE)).parent)

    def dense(self, model: str, task: int) -> dict[str, Any] | None:
        """Return what the dense model gave on one of its tasks, or why it failed; `None` if it was not tried."""
        return _read(self.path / dense_place(model, task))

    def fingerprint(self, model: str) -> str | None:
        """Return the fingerprint of a model that was pruned or evaluated here before, or `None`."""
        return (_read(self.path / model_place(model)) or {}).get("fingerprint")

    def lacks(self, cell: Cell) -> bool:
        """Return whether something is not there that the study wants to keep of a finished cell."""
        wanted = [self.masks(cell)] if "masks" in cell.keeps else []
        if "items" in cell.keeps:
            wanted += [self.path / place_of(cell, items_file(number)) for number in range(len(cell.tasks))]
        if "details" in cell.keeps and "details" not in (self.cell(cell) or {}):
            return True
        return not all(file.is_file() for file in wanted)

    def keep(self, place: str, content: bytes) -> None:
        """Write a file below the folder, whole or not at all; a cell that is finished does not become a failed one.

        Raises:
            UnfinishedError: The folder cannot be written.
        """
        file = self.path / place
        if file.name == CELL_FILE and "failed" in json.loads(content):
            before = _read(file)
            if before is not None and "failed" not in before:
                return
        with writing(self.path, "study folder"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(content, file)

    @contextmanager
    def work(self) -> Iterator[Path]:
        """Return a folder for what a pass writes; it is removed afterwards, and so are those of killed processes."""
        self.sweep()
        with _locked(self.path / LOCK, wait=True):  # no other process looks while this one makes its own
            made = Path(tempfile.mkdtemp(prefix=WORK, dir=self.path))
            held = os.open(made / LOCK_FILE, os.O_RDWR | os.O_CREAT)
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield made
        finally:
            with _locked(self.path / LOCK, wait=True):
                shutil.rmtree(made, ignore_errors=True)
            os.close(held)

    def sweep(self) -> None:
        """Remove what killed processes have left; what is locked is of a process that lives."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / LOCK, wait=True):
            for left in self.path.glob(f"{WORK}*"):
                with _locked(left / LOCK_FILE) as dead:
                    if dead:
                        shutil.rmtree(left, ignore_errors=True)


def place_of(cell: Cell, name: str) -> str:
    """Return where a file of a cell is below the study's folder."""
    return f"cells/{cell.key}/{name}"


def dense_place(model: str, task: int) -> str:
    """Return where the dense model's outcome of a task is below the study's folder."""
    return f"dense/{model}/{task}.json"


def model_place(model: str) -> str:
    """Return where the fingerprint of a model is below the study's folder."""
    return f"dense/{model}/model.json"


def items_file(task: int) -> str:
    """Return the name of the file with the outcome of each item of a task.

    It holds `measure`, `ids` (a hash of what the items are called) and `values`, a number for each item whose mean is
    the measure; without items it holds nothing.
    """
    return f"items-{task}.json"


def as_json(found: Any) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(found, indent=1) + "\n").encode()


@contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock within the context; return whether it could be had, if not waited for."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(file)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = read_json(path, "cell")
        if not isinstance(found, dict):
            raise PruneForgeError(f"cell {str(path)!r} holds no mapping")
    except PruneForgeError as error:
        raise PruneForgeError(f"{error}; remove it to run the cell again") from error
    return found
