"""A study of seconds, and what it leaves, for the tests of studies."""

from __future__ import annotations

import csv
from pathlib import Path

from pruneforge.studies.folder import CELL_FILE


def values(**changes):
    return {
        "models": {
            "digits": {
                "model": "demo:image",
                "calibration": "digits",
                "samples": 8,
                "tasks": [{"task": "imagenet", "options": {"data": "digits", "workers": 0, "limit": 40}}],
            }
        },
        "methods": {"wanda": {"metric": "wanda"}, "gradients": {"metric": "gblm", "options": {"alpha": 10}}},
        "patterns": ["2:4"],
        "seeds": [0, 1],
        **changes,
    }


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def kept(folder: Path) -> dict[str, bytes]:
    """Return everything in a study's folder but times and memory."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "measured" not in name and name != ".lock"}


def finished_in(folder: Path) -> dict[str, int]:
    """When each cell was finished, by its key."""
    cells = folder / "cells"
    return {str(path.parent.relative_to(cells)): path.stat().st_mtime_ns for path in cells.rglob(CELL_FILE)}
