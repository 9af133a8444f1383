"""Local text: plain, JSON Lines and Parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge.documents import parse_json, read_text
from pruneforge_text.slices import split_slice

SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".json", ".parquet")


class TextFile(TextSource):
    """A local file: `.txt` is one document, `.jsonl` and `.parquet` hold one a row.

    After the path, `[:80%]` or `[1000:2000]` selects some of the lines or rows, so that calibration and evaluation can
    use different parts of one file.
    """

    argument = "path"

    class Options(TextSource.Options):
        """Options of a local text file."""

        path: str = Field(description="the file, with a slice of its lines or rows behind it if not all are wanted")
        column: str = Field("text", description="field or column that holds the text of a row")

    options: Options

    @classmethod
    def reads(cls, path: str) -> bool:
        """Return whether the path, without its slice, is an existing file with the suffix of a text file."""
        file = Path(split_slice(path)[0])
        return file.is_file() and file.suffix.lower() in SUFFIXES

    def documents(self, part: Part) -> Sequence[str]:
        """Return the documents of the file, whatever the part.

        Raises:
            PruneForgeError: The file cannot be read, or the slice is empty.
        """
        name, rows = split_slice(self.options.path)
        path = Path(name)
        try:
            if path.suffix.lower() == ".parquet":
                documents = self._parquet(path)
            elif path.suffix.lower() in (".jsonl", ".json"):
                documents = self._json_lines(path)
            else:
                lines = read_text(path, "text file").splitlines(keepends=True)
                start, stop = rows.bounds(len(lines)) if lines else (0, 0)
                return ["".join(lines[start:stop])]
        except OSError as error:
            raise PruneForgeError(f"text file {name!r} cannot be read: {error}") from error
        if not documents:
            raise PruneForgeError(f"text file {name!r} holds no rows")
        start, stop = rows.bounds(len(documents))
        return documents[start:stop]

    def describe(self, part: Part) -> dict[str, Any]:
        """Return the name, slice and hash of the file."""
        name, rows = split_slice(self.options.path)
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        return {"file": Path(name).name, "rows": str(rows), "sha256": digest}

    def _json_lines(self, path: Path) -> list[str]:
        """Read a field of each line of JSON."""
        documents = []
        for number, line in enumerate(read_text(path, "text file").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                text = parse_json(line, "line")[self.options.column]
            except (PruneForgeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise PruneForgeError(
                    f"line {number} of {str(path)!r} is not a JSON object with text in field {self.options.column!r}; "
                    "name another with `source_options` column=NAME"
                )
            documents.append(text)
        return documents

    def _parquet(self, path: Path) -> list[str]:
        """Read a column of a Parquet file."""
        import pyarrow
        from pyarrow import parquet

        try:
            column = parquet.read_table(path, columns=[self.options.column]).column(0)
            kind = column.type
            if pyarrow.types.is_dictionary(kind):  # each distinct text stored once, as pandas writes categories
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise PruneForgeError(
                    f"column {self.options.column!r} of {str(path)!r} is of type {column.type}, not text; name another "
                    "with `source_options` column=NAME"
                )
            return [value or "" for value in column.to_pylist()]
        except (pyarrow.ArrowException, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PruneForgeError(f"{str(path)!r} has no readable column {self.options.column!r}: {reason}") from error
