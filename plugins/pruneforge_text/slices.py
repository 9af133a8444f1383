"""A part of a file or data set by its rows, in the notation of `datasets`: `[:80%]`, `[1000:2000]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pruneforge import PruneForgeError


@dataclass(frozen=True)
class Slice:
    """Rows from `start` up to `stop`, each a number, a percentage, or empty."""

    start: str = ""
    stop: str = ""

    def bounds(self, rows: int) -> tuple[int, int]:
        """Return the first row and the one past the last, of `rows` rows.

        Raises:
            PruneForgeError: No row is left.
        """
        start = _position(self.start, rows, 0)
        stop = _position(self.stop, rows, rows)
        if start >= stop:
            raise PruneForgeError(f"slice {self} leaves nothing of {rows} rows")
        return start, stop

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"


def split_slice(text: str) -> tuple[str, Slice]:
    """Return a path and the slice behind it, the slice of everything if there is none."""
    found = re.fullmatch(r"(.+)\[(\d*%?):(\d*%?)\]", text, re.DOTALL)
    return (found[1], Slice(found[2], found[3])) if found else (text, Slice())


def _position(text: str, rows: int, default: int) -> int:
    if not text.strip("%"):
        return default
    return min(rows, rows * int(text[:-1]) // 100 if text.endswith("%") else int(text))
