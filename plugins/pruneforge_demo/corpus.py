"""English text that every Python installation carries, in three disjoint parts.

The documents are the language reference (`pydoc_data.topics`) and the docstrings of the standard
library, read from its source without importing it. A document belongs to a part by the hash of its
name, so the parts are the same documents in every Python version even as their wording changes;
a paragraph that stands in several documents is kept in the first alone.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
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
    seen: set[str] = set()
    texts = []
    for name, text in _named_texts():
        fresh = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        document = "\n\n".join(fresh)
        if _part_of(name) == part and len(document) >= SHORTEST_DOCUMENT:
            texts.append(document)
    return tuple(texts)


def _part_of(name: str) -> Part:
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return "evaluation" if bucket == 0 else "calibration" if bucket == 1 else "training"


@functools.cache
def _named_texts() -> tuple[tuple[str, str], ...]:
    from pydoc_data.topics import topics

    found = [(f"topic {name}", text) for name, text in topics.items()]
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if not _NO_PROSE.intersection(relative.parts):
            text = _docstrings(path)
            if text:
                found.append((f"module {relative.as_posix()}", text))
    return tuple(sorted(found))


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return ""  # templates and deliberately broken samples in the library hold no prose
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text and len(text) > 60)
