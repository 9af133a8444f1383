"""The report of a study: one self-contained page, Markdown, LaTeX, and the rows as CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.durable import write_text
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.results import Row, Summary, as_csv, interval, rows_of, summaries
from pruneforge.studies.study import Cell, Study

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


@dataclass(frozen=True)
class Table:
    """One table: methods by patterns, for one model and task.

    Attributes:
        model: Name of the model.
        task: The task.
        measure: What the cells hold.
        higher_is_better: Whether a higher one is better.
        share: Whether it is a share, shown in percent.
        dense: What the dense model has.
        patterns: The columns.
        lines: For each method its summaries, by pattern.
        protocol: What the numbers were measured on, in words.
        best: By pattern, the methods that no other is better than beyond the noise.
    """

    model: str
    task: str
    measure: str
    higher_is_better: bool
    share: bool
    dense: float | None
    patterns: list[str]
    lines: dict[str, dict[str, Summary]]
    protocol: str
    best: dict[str, set[str]]

    @property
    def title(self) -> str:
        """What is measured, on which task."""
        return self.measure if self.measure == self.task else f"{self.measure}, {self.task}"


def write_report(study: Study, cells: Sequence[Cell], folder: Path) -> list[Row]:
    """Write results and report into a study's folder, and return the rows.

    Nothing in them differs between a study that was stopped and one that was not; times are in `measured.csv` alone.
    """
    held = StudyFolder(folder)
    rows = rows_of(cells, held)
    tables = tables_of(rows, study.compared_with)
    write_text(as_csv(rows), folder / "results.csv")
    write_text(json.dumps(rows, indent=1) + "\n", folder / "results.json")
    write_text(as_csv(_measured(cells, held)), folder / "measured.csv")
    write_text(as_markdown(tables, study.compared_with), folder / "report.md")
    write_text(as_latex(tables), folder / "report.tex")
    write_text(as_html(study, rows, tables), folder / "report.html")
    return rows


def _measured(cells: Sequence[Cell], held: StudyFolder) -> list[Row]:
    found = []
    for cell in cells:
        measured = held.measured(cell)
        if measured:
            place = {"model": cell.model, "method": cell.method, "pattern": str(cell.pattern), "seed": cell.seed}
            found.append(place | {name: value for name, value in measured.items() if name != "stages"})
    return found


def tables_of(rows: Sequence[Row], baseline: str) -> list[Table]:
    """Return a table for each model and task that has results."""
    found = []
    every = summaries(rows, baseline)
    for model, task in dict.fromkeys((each.model, each.task) for each in every):
        own = [each for each in every if (each.model, each.task) == (model, task)]
        of_task = [row for row in rows if row.get("task") == task and row["model"] == model]
        lines: dict[str, dict[str, Summary]] = {}
        for each in own:
            lines.setdefault(each.method, {})[each.pattern] = each
        patterns = list(dict.fromkeys(each.pattern for each in own))
        first = of_task[0]
        higher = first["higher_is_better"]
        found.append(
            Table(
                model,
                task,
                first["measure"],
                higher,
                first["share"],
                first["dense"],
                patterns,
                lines,
                _protocol(of_task),
                {
                    pattern: _best([line[pattern] for line in lines.values() if pattern in line], higher)
                    for pattern in patterns
                },
            )
        )
    return found


def _best(column: Sequence[Summary], higher: bool) -> set[str]:
    """Return the methods that are not worse than the best one by more than draws of calibration data explain."""
    if not column:
        return set()
    best = (max if higher else min)(column, key=lambda each: each.mean)
    if best.deviation is None:
        return set()  # one draw says nothing of noise
    names = {best.method}
    for each in column:
        shared = [seed for seed in each.values if seed in best.values]
        low, high = interval([each.values[seed] - best.values[seed] for seed in shared])
        if each is not best and (low is None or high is None or low <= 0 <= high):
            names.add(each.method)
    return names


def _protocol(rows: Sequence[Row]) -> str:
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    words = [f"{first['samples']} samples of {first['calibration'] or 'no data'}, {seeds} draws"]
    words += [f"{first['seqlen']} tokens each"] if first["seqlen"] else []
    words += [f"{name} {first[name]:,}" for name in ("window", "tokens", "images") if first.get(name)]
    words.append(f"propagate {first['propagate']}")
    return "; ".join(words)


def number(value: float | None, share: bool) -> str:
    """Return a number as a table shows it: shares in percent, and without decimals from 1,000 on."""
    if value is None:
        return ""
    if share:
        return f"{100 * value:.2f}"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def cell_text(summary: Summary, share: bool, between: str = " ± ") -> str:
    """Return mean and deviation of a summary."""
    text = number(summary.mean, share)
    return text if summary.deviation is None else f"{text}{between}{number(summary.deviation, share)}"


def pattern_name(pattern: str) -> str:
    """Return how a table heads a pattern: 50 %, 2:4."""
    return pattern if ":" in pattern else f"{float(pattern):.0%}"


def as_markdown(tables: Sequence[Table], baseline: str) -> str:
    """Return the tables as Markdown."""
    parts = []
    for table in tables:
        dense = number(table.dense, table.share)
        parts.append(f"## {table.model}: {table.title}\n")
        parts.append(f"Dense: {dense}. {table.protocol}. Bold: not worse than the best beyond the noise of draws.\n")
        parts.append("| method | " + " | ".join(map(pattern_name, table.patterns)) + " |")
        parts.append("|:-|" + "-:|" * len(table.patterns))
        for method, line in table.lines.items():
            texts = []
            for pattern in table.patterns:
                text = cell_text(line[pattern], table.share) if pattern in line else ""
                texts.append(f"**{text}**" if method in table.best[pattern] else text)
            name = f"{method} (baseline)" if method == baseline else method
            parts.append(f"| {name} | " + " | ".join(texts) + " |")
        parts.append("")
    return "\n".join(parts)


def as_latex(tables: Sequence[Table]) -> str:
    """Return the tables as LaTeX, for `booktabs`."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        heads = " & ".join(pattern_name(each).replace("%", "\\%") for each in table.patterns)
        parts += [
            f"% {table.model}, {table.task}; {table.protocol}",
            "\\begin{tabular}{l" + "r" * len(table.patterns) + "}",
        ]
        parts += ["\\toprule", f"method & {heads} \\\\", "\\midrule"]
        for method, line in table.lines.items():
            texts = []
            for pattern in table.patterns:
                text = f"${cell_text(line[pattern], table.share, chr(92) + 'pm ')}$" if pattern in line else ""
                texts.append(f"\\textbf{{{text}}}" if method in table.best[pattern] else text)
            parts.append(f"{method.replace('_', chr(92) + '_')} & " + " & ".join(texts) + " \\\\")
        parts += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(parts)


def as_html(study: Study, rows: Sequence[Row], tables: Sequence[Table]) -> str:
    """Return the page, which holds everything that it shows."""
    from jinja2 import Environment

    from pruneforge.studies.plots import curve

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(pattern=pattern_name)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    pictures = [curve(table) for table in tables]
    return template.render(
        study=study,
        tables=list(zip(tables, pictures, strict=True)),
        structure=_structure(rows),
        failed=[row for row in rows if row["failed"]],
        cells=len({(row["model"], row["method"], row["pattern"], row["seed"]) for row in rows}),
        baseline=study.compared_with,
        cell_text=cell_text,
        number=number,
    )


def _structure(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the mean structure of the masks of each model, method and pattern."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if not row["failed"]:
            groups.setdefault((row["model"], row["method"], row["pattern"], row["scope"]), []).append(row)
    names = ("mask_rows", "mask_columns", "random_rows", "random_columns")
    return [
        {"model": model, "method": method, "pattern": pattern, "scope": scope}
        | {name: sum(row[name] for row in own) / len(own) for name in names}
        for (model, method, pattern, scope), own in groups.items()
    ]
