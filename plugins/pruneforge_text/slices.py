"""Slices of a file's or data set's rows, in the notation of `datasets`: `[:80%]`, `[1000:2000]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pruneforge import PruneForgeError

LONGEST = 18
"""Digits of the largest number that a slice needs; more rows than that has nothing."""


@dataclass(frozen=True)
class Slice:
    """Rows from `start` to `stop`, each a number, a percentage such as "80%", or empty."""

    start: str = ""
    stop: str = ""

    def bounds(self, rows: int) -> tuple[int, int]:
        """Return the first row and the one after the last, out of `rows` rows.

        Raises:
            PruneForgeError: The slice is empty.
        """
        start = _position(self.start, rows, 0)
        stop = _position(self.stop, rows, rows)
        if start >= stop:
            raise PruneForgeError(f"slice {self} selects none of {rows} rows")
        return start, stop

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"


def split_slice(text: str) -> tuple[str, Slice]:
    """Split a path from the slice after it; without one, the slice takes all rows."""
    match = re.fullmatch(r"(.+)\[([0-9]*%?):([0-9]*%?)\]", text, re.DOTALL)
    return (match[1], Slice(match[2], match[3])) if match else (text, Slice())


def _position(text: str, rows: int, default: int) -> int:
    """Return the row of one end of a slice, at most `rows`; `default` if it is empty."""
    if not text.strip("%"):
        return default
    text = text.lstrip("0") or "0"
    if len(text) > LONGEST:
        return rows
    return min(rows, rows * int(text[:-1]) // 100 if text.endswith("%") else int(text))
