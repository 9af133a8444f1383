"""The journal of a run: what it is, and which blocks are finished.

One JSON object a line in the output folder. The first line says what the run is; each later one that a block is
finished, after its weights and masks are on the disk. A line without its end was being written when the run was
stopped, and does not count.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.rewrite import sync_folder, writing
from pruneforge.errors import PruneForgeError

FILE = "journal.jsonl"
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
        path = folder / FILE
        there = path.is_file()
        if there and not resume:
            raise PruneForgeError(
                f"output folder {str(folder)!r} holds an unfinished run; go on with --resume, or empty the folder"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - open for as long as the run lasts
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise PruneForgeError(f"another process is writing to output folder {str(folder)!r}") from None
        wanted = json.loads(json.dumps({"format": FORMAT, **run}))
        lines = self._complete_lines()
        self.resumed = bool(lines)
        if not lines:
            self.append(wanted)
            sync_folder(folder)
        else:
            difference = _difference(lines[0], wanted)
            if difference:
                self._file.close()
                raise PruneForgeError(f"the unfinished run in {str(folder)!r} is another one: {difference}")
        self.entries = lines[1:]

    def _complete_lines(self) -> list[dict[str, Any]]:
        """Return the lines that were written whole, and cut off what follows them."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise PruneForgeError(
                    f"line {number} of {str(self.folder / FILE)!r} is damaged; empty the folder and begin anew"
                ) from error
        if whole != text:
            os.ftruncate(self._file.fileno(), len(whole))
        return lines

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line, on the disk when this returns.

        Raises:
            UnfinishedError: The disk is full, or cannot be written.
        """
        with writing(self.folder):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.entries.append(dict(entry))

    def close(self, finished: bool) -> None:
        """Close the journal; remove it if the run is finished."""
        if finished:
            (self.folder / FILE).unlink()
        self._file.close()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first thing in which two runs differ, or nothing."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found = _difference(old, new, f"{prefix}{key} ")
            if found:
                return found
        elif old != new:
            return f"{prefix}{key} was {_short(old)} and is {_short(new)} now"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:56] + "..."
