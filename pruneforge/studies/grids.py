"""What the tables of a report say, cell by cell, whichever form they are written in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pruneforge.studies.noise import Interval
from pruneforge.studies.results import Row
from pruneforge.studies.tables import Summary, Table, deviation


@dataclass(frozen=True)
class Entry:
    """One cell of a grid.

    Attributes:
        text: What it shows.
        value: What it is sorted by; `None` for its text, or last if it is a number that is missing.
        best: Whether it is bold.
        tag: What it is, beside its text, such as "baseline".
    """

    text: str
    value: float | None = None
    best: bool = False
    tag: str = ""


MISSING = Entry("–")


@dataclass(frozen=True)
class Grid:
    """A table as every form of the report shows it.

    Attributes:
        heads: Names of the columns.
        rows: An entry for each column.
        texts: Number of columns from the left that hold texts.
        groups: What columns stand under, and how many of them.
        notes: Lines below it.
    """

    heads: list[str]
    rows: list[list[Entry]]
    texts: int = 1
    groups: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def number(value: float | None, share: bool, digits: int = 2) -> str:
    """Return a number as a table shows it: shares in percent, and without decimals from 1,000 on."""
    if value is None:
        return ""
    shown = 100 * value if share else value
    return f"{shown:.{digits}f}" if abs(shown) < 1000 else f"{shown:,.0f}"


def signed(value: float, share: bool, digits: int = 2) -> str:
    """Return a difference as a table shows it."""
    text = number(abs(value), share, digits)
    return text if not text.strip("0.") else f"{'−' if value < 0 else '+'}{text}"


def cell_text(summary: Summary, share: bool) -> str:
    """Return mean and deviation of a summary."""
    return _spread(number(summary.mean, share), summary.deviation, share)


def pattern_name(pattern: str) -> str:
    """Return how a table heads a pattern: 50%, 2:4."""
    return pattern if ":" in pattern else f"{100 * float(pattern):.10g}%"


def method_entry(method: str, baseline: str, controls: Collection[str]) -> Entry:
    """Return a method's name, with what it is to the study."""
    return Entry(method, tag="baseline" if method == baseline else "control" if method in controls else "")


def main_grid(table: Table, baseline: str, controls: Collection[str] = ()) -> Grid:
    """Return mean and deviation by method and pattern, with published numbers where some are known."""
    heads, groups = ["method"], [("", 1)]
    for pattern in table.patterns:
        compared = _has_published(table, pattern)
        heads += ["here", "published", "difference"] if compared else [pattern_name(pattern)]
        groups.append((pattern_name(pattern), 3) if compared else ("", 1))
    rows = [
        [
            method_entry(method, baseline, controls),
            *(entry for each in table.patterns for entry in _entries(table, method, each)),
        ]
        for method, line in table.lines.items()
    ]
    sources = dict.fromkeys(
        row[name] for row in table.rows for name in ("published_dense_source", "published_source") if row[name]
    )
    notes = [f"Published: {source}." for source in sources]
    return Grid(heads, rows, 1, groups if len(heads) > len(groups) else [], notes)


def _has_published(table: Table, pattern: str) -> bool:
    return any(pattern in line and line[pattern].published is not None for line in table.lines.values())


def _entries(table: Table, method: str, pattern: str) -> list[Entry]:
    """Return what a method has at a pattern and, where that is compared, what was published and the difference."""
    summary, compared = table.lines[method].get(pattern), _has_published(table, pattern)
    if summary is None:
        return [Entry(table.without(method, pattern)), *([MISSING] * 2 if compared else [])]
    text = cell_text(summary, table.share)
    if len(summary.values) < table.draws:
        text += f" ({len(summary.values)} of {table.draws} draws)"
    found = [Entry(text, summary.mean, summary.best)]
    if compared and summary.published is None:
        found += [MISSING] * 2
    elif compared and summary.published is not None:
        gap = summary.mean - summary.published
        found += [Entry(number(summary.published, table.share), summary.published)]
        found += [Entry(signed(gap, table.share), gap)]
    return found


def loss_grid(tables: Sequence[Table], baseline: str, controls: Collection[str] = ()) -> Grid | None:
    """Return the increase of the loss relative to the dense model's, of all models in one; `None` without losses."""
    known = [table for table in tables if any(each.losses for line in table.lines.values() for each in line.values())]

    def entry(table: Table, summary: Summary) -> Entry:
        increase = summary.loss_increase
        if increase is None:
            return MISSING
        return Entry(_spread(signed(increase, True, 1), deviation(summary.losses), True, 1), increase)

    return _over_models(known, baseline, controls, entry)


def points_grid(tables: Sequence[Table], baseline: str, controls: Collection[str] = ()) -> Grid | None:
    """Return the percentage points that shares changed from the dense model's; `None` without shares."""

    def entry(table: Table, summary: Summary) -> Entry:
        assert table.dense is not None
        change = summary.mean - table.dense
        return Entry(_spread(signed(change, True), summary.deviation, True), change, summary.best)

    known = [table for table in tables if table.share and table.dense is not None]
    return _over_models(known, baseline, controls, entry)


def _over_models(
    tables: Sequence[Table], baseline: str, controls: Collection[str], entry: Callable[[Table, Summary], Entry]
) -> Grid | None:
    if not tables:
        return None
    methods = dict.fromkeys(method for table in tables for method in table.lines)
    rows = []
    for method in methods:
        entries = [method_entry(method, baseline, controls)]
        for table in tables:
            line = table.lines.get(method, {})
            entries += [
                entry(table, line[each]) if each in line else Entry(table.without(method, each))
                for each in table.patterns
            ]
        rows.append(entries)
    heads = ["method", *(pattern_name(each) for table in tables for each in table.patterns)]
    several = len({table.model for table in tables}) < len(tables)
    names = [f"{table.model}, {table.title}" if several else table.model for table in tables]
    groups = [("", 1), *((name, len(table.patterns)) for name, table in zip(names, tables, strict=True))]
    return Grid(heads, rows, 1, groups)


def differences_grid(table: Table, baseline: str) -> Grid | None:
    """Return the paired differences to the baseline with their intervals; `None` if there are none."""
    rows, notes = [], []
    for method, line in table.lines.items():
        for pattern in (each for each in table.patterns if each in line):
            found = line[pattern].difference
            if found is None:
                continue
            rows.append(
                [
                    Entry(method),
                    Entry(pattern_name(pattern)),
                    Entry(signed(found.mean, table.share), found.mean),
                    _ends(found.over_draws, table.share),
                    Entry(str(found.draws), found.draws),
                    _ends(found.over_items, table.share),
                    Entry(f"{found.items:,}", found.items) if found.items else MISSING,
                ]
            )
            if found.note:
                notes.append(f"{method}, {pattern_name(pattern)}: no test over items, {found.note} than {baseline}.")
    heads = ["method", "pattern", "difference", "95% over draws", "draws", "95% over items", "items"]
    if all(row[-1] is MISSING for row in rows):
        heads, rows = heads[:-2], [row[:-2] for row in rows]
    return Grid(heads, rows, 2, [], notes) if rows else None


def _ends(interval: Interval | None, share: bool) -> Entry:
    if interval is None:
        return MISSING
    low, high = interval
    return Entry(f"[{signed(low, share)}, {signed(high, share)}]", low)


def recipes_grid(table: Table) -> Grid:
    """Return the hash of each cell's recipe."""
    hashes: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        hashes.setdefault((row["method"], row["pattern"]), []).append(row["recipe"])
    rows = [
        [Entry(method), *(Entry(" ".join(hashes.get((method, pattern), []))) for pattern in table.patterns)]
        for method in table.lines
    ]
    return Grid(["method", *map(pattern_name, table.patterns)], rows, 1 + len(table.patterns))


def structure_grid(rows: Sequence[Row]) -> Grid | None:
    """Return which share of masks and scores rows and columns explain, means over draws; `None` without results."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if not row["failed"] and row["task_number"] == 0:  # once for each cell
            scope = row["scope"] or ("group" if ":" in row["pattern"] else MISSING.text)
            place = (row["model"], row["method"], pattern_name(row["pattern"]), scope)
            groups.setdefault(place, []).append(row)
    scored = any("score_rows" in row for own in groups.values() for row in own)
    kinds = {"mask": "masks", "random": "random masks", **({"score": "scores"} if scored else {})}
    lines = [
        [*map(Entry, place), *(_share(own, f"{kind}_{way}") for kind in kinds for way in ("rows", "columns"))]
        for place, own in groups.items()
    ]
    heads = ["model", "method", "pattern", "scope", *["rows", "columns"] * len(kinds)]
    return Grid(heads, lines, 4, [("", 4), *((name, 2) for name in kinds.values())]) if lines else None


def _share(rows: Sequence[Row], name: str) -> Entry:
    known = [row[name] for row in rows if name in row]
    if not known:
        return MISSING
    mean = statistics.fmean(known)
    return Entry(f"{mean:.2%}", mean)


def failed_grid(rows: Sequence[Row]) -> Grid | None:
    """Return the cells that failed, with their reasons; `None` if none did."""
    failed = [row for row in rows if row["failed"]]
    places = [(row["model"], row["method"], pattern_name(row["pattern"]), str(row["seed"])) for row in failed]
    lines = [[*map(Entry, place), Entry(row["failed"])] for place, row in zip(places, failed, strict=True)]
    return Grid(["model", "method", "pattern", "draw", "reason"], lines, 5) if lines else None


def _spread(mean: str, deviation: float | None, share: bool, digits: int = 2) -> str:
    return mean if deviation is None else f"{mean} ± {number(deviation, share, digits)}"
