"""The time of a study, and what sharing saves over its cells run one by one.

    python benchmarks/study.py

Runs the shipped study `demo` (2 models x 4 metrics and a control x 4 patterns x 3 draws) as a user would, then the
cells of its first draw together and each alone, in turns. Writes `benchmarks/results/study.json`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from pruneforge.plugins import loaded_plugins
from pruneforge.runs.provenance import machine, versions
from pruneforge.studies.plan import cells_of
from pruneforge.studies.run import run_study
from pruneforge.studies.study import Study, make_study

ROOT = Path(__file__).parents[1]
ROUNDS = 3


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def whole(folder: Path) -> float:
    """Return the time of the command that runs the whole study, from its start to the report."""
    command = [sys.executable, "-m", "pruneforge", "compare", "--preset", "demo", "--output", str(folder)]
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def one_by_one(study: Study, folder: Path) -> None:
    """Run each cell of a study alone; the dense models, once."""
    for cell in cells_of(study, []):
        run_study(study, folder, only=[cell.key])


def main() -> None:
    """Measure, and write what was found."""
    study = make_study(yaml.safe_load(loaded_plugins().registry.file("study", "demo").read()))
    first = study.model_copy(update={"seeds": study.seeds[:1]})
    cells = len(cells_of(study, []))
    with tempfile.TemporaryDirectory() as place:
        total = whole(Path(place, "whole"))
        print(f"{cells} cells: {total:.0f} s")
        together, alone = [], []
        run_study(first, Path(place, "warm"))
        for turn in range(ROUNDS):
            together.append(seconds(lambda: run_study(first, Path(place, f"together-{turn}"))))  # noqa: B023
            alone.append(seconds(lambda: one_by_one(first, Path(place, f"alone-{turn}"))))  # noqa: B023
            print(f"first draw: {together[-1]:.1f} s together, {alone[-1]:.1f} s one by one")
    ratio = statistics.median(alone) / statistics.median(together)
    found = {
        "study": {"cells": cells, "seconds": round(total, 1)},
        "first_draw": {
            "cells": len(cells_of(first, [])),
            "together_seconds": [round(each, 2) for each in together],
            "one_by_one_seconds": [round(each, 2) for each in alone],
            "one_by_one_over_together": round(ratio, 2),
        },
        "machine": machine(),
        "versions": versions(),
    }
    (ROOT / "benchmarks" / "results" / "study.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"sharing takes {1 / ratio:.0%} of the time of cells run one by one")


if __name__ == "__main__":
    main()
