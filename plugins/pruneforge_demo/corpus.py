"""English text that every Python installation carries, in three disjoint parts.

The documents are the language reference (`pydoc_data.topics`) and the docstrings of the standard
library, read from its source without importing it. A document belongs to a part by the hash of its
name, so the parts are the same documents in every Python version even as their wording changes;
a paragraph that stands in several documents is kept in the first alone.

Parsing takes seconds, so the documents are kept in a file for the processes to come. It is trusted only as long as
Python, its library's files and this module are what they were.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Part = Literal["training", "calibration", "evaluation"]

SHORTEST_DOCUMENT = 500
"""Characters; what is shorter says too little to learn or to measure from."""

_NO_PROSE = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "pydoc_data",
}


@functools.cache
def documents(part: Part) -> tuple[str, ...]:
    """Return the documents of one part, in an order that depends on their names alone.

    Args:
        part: `training` (80 % of the documents), `calibration` (10 %) or `evaluation` (10 %).

    Returns:
        Texts of at least `SHORTEST_DOCUMENT` characters, paragraphs separated by blank lines.
    """
    return _parts()[part]


@functools.cache
def _parts() -> dict[Part, tuple[str, ...]]:
    """Return the documents of all parts, from the cache if they are there."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = list(_sources(library))
    try:
        file, key = cache_file(), _key(library, sources)
    except (OSError, RuntimeError):  # no home folder, or this module is in an archive
        return _parse(library, sources)
    cached = _read(file, key)
    if cached is not None:
        return cached
    parts = _parse(library, sources)
    with contextlib.suppress(OSError):  # what cannot be kept is parsed again
        _write(file, key, parts)
    return parts


def cache_file() -> Path:
    """Return where the documents are kept: in `$PRUNEFORGE_CACHE`, or the user's cache folder."""
    root = os.environ.get("PRUNEFORGE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(root).expanduser() if root else Path(home).expanduser() / "pruneforge"
    return folder / "python-docs" / f"{sys.implementation.cache_tag}.json"


def _key(library: Path, sources: list[Path]) -> str:
    """Return a digest of what decides the documents: Python, the files that are read as they stand, and this code."""
    digest = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes())
    for path in [*sources, library / "pydoc_data" / "topics.py"]:
        status = path.stat()
        digest.update(f"{path.relative_to(library).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read(file: Path, key: str) -> dict[Part, tuple[str, ...]] | None:
    """Return the documents in a file, or none if it is missing, damaged or of another key."""
    try:
        head, _, body = file.read_bytes().partition(b"\n")
        if json.loads(head) != {"key": key, "sha256": hashlib.sha256(body).hexdigest()}:
            return None
    except (OSError, ValueError):
        return None
    return {part: tuple(texts) for part, texts in json.loads(body).items()}


def _write(file: Path, key: str, parts: dict[Part, tuple[str, ...]]) -> None:
    body = json.dumps(parts).encode()
    head = json.dumps({"key": key, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(".partial", file.stem, file.parent)
    try:
        with open(descriptor, "wb") as opened:
            opened.write(head + b"\n" + body)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _parse(library: Path, sources: list[Path]) -> dict[Part, tuple[str, ...]]:
    seen: set[str] = set()
    parts: dict[Part, list[str]] = {"training": [], "calibration": [], "evaluation": []}
    for name, text in _named_texts(library, sources):
        fresh = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        document = "\n\n".join(fresh)
        if len(document) >= SHORTEST_DOCUMENT:
            parts[_part_of(name)].append(document)
    return {part: tuple(texts) for part, texts in parts.items()}


def _part_of(name: str) -> Part:
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return "evaluation" if bucket == 0 else "calibration" if bucket == 1 else "training"


def _sources(library: Path) -> Iterator[Path]:
    """Yield the library's modules that hold prose; what is installed beside it can be many times as much."""
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - _NO_PROSE)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _named_texts(library: Path, sources: list[Path]) -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    texts = [(f"topic {name}", text) for name, text in topics.items()]
    for path in sources:
        text = _docstrings(path)
        if text:
            texts.append((f"module {path.relative_to(library).as_posix()}", text))
    return sorted(texts)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return ""  # templates and deliberately broken samples in the library hold no prose
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in docstrings if text and len(text) > 60)
