"""The journal of a run: its identity, and the blocks it has finished.

A file of JSON lines in the output folder. The first line is the identity of the run. Each later line records a finished
block, and is written once the block's weights and masks are on the disk. A last line without a line break was being
written when the run stopped, and is ignored. Each line has a checksum, so that nothing else is taken for a run's work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.durable import sync, writing
from pruneforge.checkpoint.folder import check_output
from pruneforge.documents import parse_json
from pruneforge.errors import PruneForgeError, UnfinishedError

JOURNAL_FILE = "journal.jsonl"
FORMAT = 2


class Journal:
    """The journal of one run, locked against other processes while it is open.

    Attributes:
        folder: The output folder.
        entries: The lines after the first, in order.
        resumed: Whether it continues the run of an earlier process.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], resume: bool) -> None:
        """Open the journal in `folder`, or start one.

        Args:
            folder: The output folder, created if needed.
            run: The identity of the run: everything that decides its result. JSON-serialisable.
            resume: Whether to continue an unfinished run.

        Raises:
            PruneForgeError: Another process has the journal open, the folder holds another unfinished run, or it
                holds this one and `resume` is false.
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
            # As JSON reads it back, so that tuples and lists compare equal.
            wanted = json.loads(json.dumps({"format": FORMAT, **run}))
            if not lines:
                self.append(wanted)
                with writing(folder):
                    sync(folder)
            other = difference(lines[0], wanted) if lines else ""
            if other:
                raise PruneForgeError(f"the unfinished run in {str(folder)!r} is another one: {other}")
        except PruneForgeError:
            self.close()
            raise
        self.entries = lines[1:]

    def _complete_lines(self) -> list[dict[str, Any]]:
        """Return the complete lines, and cut off an incomplete last one."""
        text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        whole = text[: text.rfind(b"\n") + 1]
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            entry = entry_of(line)
            if entry is None:
                raise PruneForgeError(
                    f"line {number} of {str(self.folder / JOURNAL_FILE)!r} is damaged, was edited, or is of another "
                    "version; empty the folder and start again"
                )
            lines.append(entry)
        if whole != text:
            os.ftruncate(self._file, len(whole))
        return lines

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line, flushed to the disk when this returns.

        Raises:
            UnfinishedError: The disk is full or cannot be written.
        """
        line = line_of(entry)
        with writing(self.folder):
            if os.write(self._file, line) < len(line):  # the next process cuts the incomplete line off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        self.entries.append(dict(entry))

    def close(self) -> None:
        """Close the journal, which unlocks it."""
        os.close(self._file)


def line_of(entry: Mapping[str, Any]) -> bytes:
    """Return the line of a journal that holds an entry."""
    text = json.dumps(entry)
    return json.dumps({"crc32": zlib.crc32(text.encode()), "entry": text}).encode() + b"\n"


def entry_of(line: bytes) -> dict[str, Any] | None:
    """Return the entry that a line of a journal holds, or `None` if the line is not as `line_of` wrote it."""
    try:
        held = parse_json(line.decode(), "line")
        if held["crc32"] != zlib.crc32(held["entry"].encode()):
            return None
        entry = json.loads(held["entry"])
    except (PruneForgeError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if isinstance(entry, dict) else None


@contextmanager
def held(
    folder: Path,
    run: Mapping[str, Any],
    resume: bool,
    started: Callable[[Journal], bool],
    remove: Callable[[], object],
) -> Iterator[Journal]:
    """Hold an output folder for one run within the context, which removes the journal at the end.

    The folder is emptied again after an error if nothing was started, or if resuming would fail the same way.

    Args:
        folder: The folder; nothing but the journal is written to it here.
        run: The identity of the run.
        resume: Whether to continue an unfinished run.
        started: Whether there is anything to go on from.
        remove: Removes what the run has written.

    Raises:
        PruneForgeError: As `Journal` says, or the folder is not empty and holds no journal.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if not (folder / JOURNAL_FILE).is_file():
        check_output(folder)
    journal = Journal(folder, run, resume)
    try:
        yield journal
    except BaseException as error:
        hopeless = isinstance(error, PruneForgeError) and not isinstance(error, UnfinishedError)
        emptied = not started(journal) or (hopeless and not journal.resumed)
        if emptied:
            remove()
            (folder / JOURNAL_FILE).unlink(missing_ok=True)
        journal.close()
        with suppress(OSError):  # somebody has put something else into it meanwhile
            for path in made if emptied else ():
                path.rmdir()
        raise
    (folder / JOURNAL_FILE).unlink()  # while it is still locked
    journal.close()


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
        os.close(file)  # its owner finished and removed it just before it was locked: lock a new one


def difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """Return the first difference between two identities, as text for a user, or an empty string."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            deeper = difference(old, new, f"{prefix}{key} ")
            if deeper:
                return deeper
        elif old != new:
            return f"{prefix}{key} was {_short(old)} and is {_short(new)} now"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:56] + "..."
