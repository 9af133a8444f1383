"""The journal of a run: what it is, and which blocks are finished.

One JSON object a line in the output folder. The first line says what the run is; each later one that a block is
finished, after its weights and masks are on the disk. A line without its end was being written when the run was
stopped, and does not count.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.durable import sync, writing
from pruneforge.errors import PruneForgeError

JOURNAL_FILE = "journal.jsonl"
FORMAT = 1


class Journal:
    """The open journal of one run; while it is open, no other process opens it.

    Attributes:
        entries: What was appended so far, in order.
        resumed: Whether it goes on from an earlier process.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], resume: bool) -> None:
        """Open the journal in `folder`, or begin one.

        Args:
            folder: The output folder; made if it is not there.
            run: What decides the result: recipe, fingerprints, versions. Of types that JSON holds.
            resume: Whether to go on from an unfinished run.

        Raises:
            PruneForgeError: Another process has it open, or an unfinished run is another one, or is there though
                `resume` is not set.
            UnfinishedError: The folder cannot be written.
        """
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _locked(folder / JOURNAL_FILE)
        try:
            lines = self._complete_lines()
            self.resumed = bool(lines)
            if lines and not resume:
                raise PruneForgeError(
                    f"output folder {str(folder)!r} holds an unfinished run; go on with `resume`, or empty the folder"
                )
            wanted = json.loads(json.dumps({"format": FORMAT, **run}))
            if not lines:
                self.append(wanted)
                sync(folder)
            other = difference(lines[0], wanted) if lines else ""
            if other:
                raise PruneForgeError(f"the unfinished run in {str(folder)!r} is another one: {other}")
        except PruneForgeError:
            self.close()
            raise
        self.entries = lines[1:]

    def _complete_lines(self) -> list[dict[str, Any]]:
        """Return the lines that were written whole, and cut off what follows them."""
        text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        whole = text[: text.rfind(b"\n") + 1]
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise PruneForgeError(
                    f"line {number} of {str(self.folder / JOURNAL_FILE)!r} is damaged; empty the folder and begin anew"
                ) from error
        if whole != text:
            os.ftruncate(self._file, len(whole))
        return lines

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line, on the disk when this returns.

        Raises:
            UnfinishedError: The disk is full, or cannot be written.
        """
        line = json.dumps(entry).encode() + b"\n"
        with writing(self.folder):
            if os.write(self._file, line) < len(line):  # what there is of the line is cut off by the next reader
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        self.entries.append(dict(entry))

    def close(self) -> None:
        """Close the journal, and let other processes have it."""
        os.close(self._file)


def _locked(path: Path) -> int:
    """Open the journal for this process alone.

    Raises:
        PruneForgeError: Another process has it open.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise PruneForgeError(f"another process is writing to output folder {str(path.parent)!r}") from None
        except OSError:
            os.close(file)
            raise
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            return file
        os.close(file)  # its owner finished, and removed it, just before it was locked


def difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first thing in which two runs differ, or nothing."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found = difference(old, new, f"{prefix}{key} ")
            if found:
                return found
        elif old != new:
            return f"{prefix}{key} was {_short(old)} and is {_short(new)} now"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:56] + "..."
