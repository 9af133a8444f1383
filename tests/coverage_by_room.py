"""Print the coverage that `make test-all` measured, by room and plugin: `python tests/coverage_by_room.py`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from coverage import Coverage

FLOOR = 0.93
"""Share of the lines below which the command fails; a little less than what is measured."""

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print a line for each folder and one for all of them; fail if the tests reach fewer lines than they did."""
    measured = Coverage()
    measured.load()
    lines: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for file in sorted(measured.get_data().measured_files()):
        _, statements, _, missed, _ = measured.analysis2(file)
        parts = Path(file).relative_to(ROOT).parts
        for room in ("/".join(parts[: 2 if len(parts) > 2 else 1]), "total"):
            lines[room] += len(statements)
            missing[room] += len(missed)
    for room in sorted(lines, key=lambda room: (room == "total", room)):
        share = 1 - missing[room] / max(lines[room], 1)
        print(f"{room:36}{lines[room]:6} lines{missing[room]:6} missed {share:7.1%}")
    if share < FLOOR:
        sys.exit(f"the tests reach {share:.1%} of the lines, less than {FLOOR:.0%}")


if __name__ == "__main__":
    main()
