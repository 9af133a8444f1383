"""What the runs of a study cost, as a page beside its report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pruneforge.studies import grids
from pruneforge.studies.grids import Entry, Grid
from pruneforge.studies.page import Methods, environment, shown_methods
from pruneforge.studies.panels import Point, scatter
from pruneforge.studies.results import Row
from pruneforge.studies.study import Study
from pruneforge.studies.tables import Table, deviation

MIB = 1 << 20
COSTS = (
    ("seconds", "seconds", 1),
    ("peak_bytes", "peak memory, MiB", MIB),
    ("peak_device_bytes", "peak memory of the device, MiB", MIB),
)
"""Columns of `measured.csv` that are drawn: name, label and unit."""


def as_costs(study: Study, tables: Sequence[Table], measured: Sequence[Row]) -> str:
    """Return what the runs of a study cost, as a page that differs from run to run.

    Args:
        study: The study.
        tables: What its cells found.
        measured: The rows of `measured.csv`.
    """
    methods = shown_methods(study)
    shown = []
    for number, table in enumerate(tables):
        own = [row for row in measured if row["model"] == table.model]
        quality = f"{table.measure}, %" if table.share else table.measure
        pictures = []
        for name, label, unit in COSTS:
            points = _points(table, own, name, unit)
            if len(points) > 1:
                labels, losses = (label, quality), not table.higher_is_better
                pictures.append(scatter(points, methods.styles, labels, losses, f"{name} {number}"))
        shown.append({"table": table, "pictures": pictures, "grid": _grid(table, own, methods)})
    shared = any(row["runs_in_the_pass"] > 1 for row in measured)
    template = environment().get_template("measured.html.j2")
    return template.render(study=study, shown=shown, methods=methods, shared=shared)


def _points(table: Table, measured: Sequence[Row], name: str, unit: int) -> dict[str, Point]:
    """Return cost and quality of each method, of runs at one pattern that shared their pass with none."""
    scale = 100 if table.share else 1
    points = {}
    for method, line in table.lines.items():
        place = {"method": method, "pattern": table.middle, "runs_in_the_pass": 1}
        own = [row for row in measured if place.items() <= row.items() and row.get(name) is not None]
        spent = {row["seed"]: row[name] / unit for row in own}
        if spent and table.middle in line:
            each = line[table.middle]
            up = None if each.deviation is None else scale * each.deviation
            points[method] = (statistics.fmean(spent.values()), deviation(spent), scale * each.mean, up)
    return points


def _grid(table: Table, measured: Sequence[Row], methods: Methods) -> Grid:
    rows = []
    for method, line in table.lines.items():
        for pattern in (each for each in table.patterns if each in line):
            place = {"method": method, "pattern": pattern}
            own = [row for row in measured if place.items() <= row.items()]
            if own:
                seconds, runs, memory = (
                    statistics.fmean(row[name] for row in own) for name in ("seconds", "runs_in_the_pass", "peak_bytes")
                )
                rows.append(
                    [
                        grids.method_entry(method, methods.baseline, methods.controls),
                        Entry(grids.pattern_name(pattern)),
                        Entry(grids.cell_text(line[pattern], table.share), line[pattern].mean),
                        Entry(f"{seconds:,.1f}", seconds),
                        Entry(f"{runs:.10g}", runs),
                        Entry(f"{memory / MIB:,.0f}", memory),
                    ]
                )
    return Grid(["method", "pattern", table.measure, "seconds", "runs in the pass", "peak memory, MiB"], rows, 2)
