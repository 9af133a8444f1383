"""The report of a sweep: curves with their knees, components and similarity, as a page, Markdown, JSON and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.durable import write_text
from pruneforge.studies.curve import curve
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.grids import cell_text, number
from pruneforge.studies.knee import Knee, Rule, knees
from pruneforge.studies.masks import Components, Similarity, components, similarities
from pruneforge.studies.page import environment, shown_methods
from pruneforge.studies.plan import Cell
from pruneforge.studies.plots import on_axis
from pruneforge.studies.results import Row
from pruneforge.studies.sweep import Sweep
from pruneforge.studies.tables import Table, tables_of


@dataclass(frozen=True)
class Grid:
    """One table, as every form of the report shows it.

    Attributes:
        title: Its title.
        notes: Sentences about it.
        head: The columns.
        lines: Its lines, of as many texts as there are columns.
        picture: SVG, or an empty text.
        file: Name of the picture's file.
    """

    title: str
    notes: list[str]
    head: list[str]
    lines: list[list[str]]
    picture: str = ""
    file: str = ""


def write_sweep(
    sweep: Sweep, cells: Sequence[Cell], rows: Sequence[Row], folder: Path, rule: Rule
) -> tuple[dict[str, Any], list[Grid]]:
    """Write the report of a sweep into its study's folder.

    Args:
        sweep: The sweep.
        cells: Its cells, run.
        rows: What they found.
        folder: The study's folder.
        rule: Where curves have their knee.

    Returns:
        What was found, of types that JSON holds (`rule`, `left_out`, `knees`, `components`, `similarity`), and tables
        that show it.
    """
    held = StudyFolder(folder)
    tables = tables_of(rows, sweep.study.compared_with)
    bends = knees(tables, rows, sweep.sparsities, rule)
    by_role = components(cells, held, sweep.shapes)
    alike = list(similarities(cells, held))
    found = {
        "rule": asdict(rule),
        "left_out": sweep.left_out,
        "knees": [asdict(each) for each in bends],
        "components": [asdict(each) for each in by_role],
        "similarity": [asdict(each) for each in alike],
    }
    grids = [_curve(sweep, table, bends, rule) for table in tables]
    grids += [_components(each) for each in by_role]
    grids += _similarity(alike)
    grids += _failed(rows)
    for grid in grids:
        if grid.picture:
            write_text(grid.picture, folder / grid.file)
    write_text(json.dumps(found, indent=1) + "\n", folder / "sweep.json")
    write_text(as_markdown(sweep, grids), folder / "sweep.md")
    write_text(as_html(sweep, grids), folder / "sweep.html")
    return found, grids


def left_out(sweep: Sweep) -> list[str]:
    """Return a sentence for each pattern that is not in the sweep because it does not fit."""
    return [f"{pattern} is left out: {why}" for pattern, why in sweep.left_out.items()]


def as_markdown(sweep: Sweep, grids: Sequence[Grid]) -> str:
    """Return the report as Markdown; pictures are files beside it."""
    parts = ["# Sweep\n", *(f"{note}.\n" for note in left_out(sweep))]
    for grid in grids:
        parts += [f"## {grid.title}\n", *(f"{note}\n" for note in grid.notes)]
        parts += [f"![{grid.title}]({grid.file})\n"] if grid.picture else []
        lines = (grid.head, ["-:"] * len(grid.head), *grid.lines)
        parts += ["| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines]
        parts.append("")
    return "\n".join(parts)


def as_html(sweep: Sweep, grids: Sequence[Grid]) -> str:
    """Return the report as a page, which holds everything that it shows."""
    template = environment().get_template("sweep.html.j2")
    return template.render(study=sweep.study, left_out=left_out(sweep), grids=grids)


def _curve(sweep: Sweep, table: Table, bends: Sequence[Knee], rule: Rule) -> Grid:
    own = {knee.method: knee for knee in bends if (knee.model, knee.task) == (table.model, table.task)}
    methods = list(sweep.study.all_methods())
    lines = []
    for pattern in _in_order(map(str, sweep.study.patterns)):
        summaries = [table.lines.get(method, {}).get(pattern) for method in methods]
        texts = (
            cell_text(each, table.share) if each else table.without(method, pattern)
            for method, each in zip(methods, summaries, strict=True)
        )
        lines.append([_label(pattern), *texts])
    dense = f"{number(table.dense, table.share)}{'%' if table.share else ''}"
    notes = [f"Dense: {dense}. {'Higher' if table.higher_is_better else 'Lower'} is better. {table.protocol}."]
    if own:
        lines.append(["knee", *(_bend(own[method]) if method in own else "" for method in methods)])
        notes.append(
            f"Knee: the largest sparsity such that it and every smaller one have {rule.words(table)}; 0% is the dense "
            "model."
        )
    else:
        notes.append("No knee: the task reports neither a share nor a loss.")
    caption = f"star: knee, {rule.words(table)} up to there" if own else ""
    file = re.sub(r"[^\w.,+-]+", "-", f"sweep-{table.model}-{table.task}") + ".svg"
    stars = {method: knee.sparsity for method, knee in own.items()}
    picture = curve(table, shown_methods(sweep.study).styles, file, stars, caption)
    return Grid(f"{table.model}: {table.title}", notes, ["sparsity", *methods], lines, picture, file)


def _components(found: Components) -> Grid:
    patterns = _in_order(found.shares)
    roles = list(found.shares[patterns[0]])
    lines = [[_label(each), *(f"{found.shares[each][role]:.2%}" for role in roles)] for each in patterns]
    title = f"{found.model}: {found.method}, share pruned by component"
    return Grid(title, ["Of the weights of all layers of the same role."], ["sparsity", *roles], lines)


def _similarity(found: Sequence[Similarity]) -> Iterator[Grid]:
    notes = [
        "Pruned in both: share of the weights that either model lost (Jaccard index). By chance: the same of random "
        "masks. Alike: share of weights that both keep or both lost. Each layer has the same random numbers in all "
        "models, so that random scores prune them alike."
    ]
    for models in dict.fromkeys(each.models for each in found):
        lines = []
        for method in dict.fromkeys(each.method for each in found):
            own = {each.pattern: each for each in found if (each.models, each.method) == (models, method)}
            for pattern in _in_order(own):
                values = (own[pattern].jaccard, own[pattern].chance, own[pattern].same)
                lines.append([method, _label(pattern), *(f"{value:.2%}" for value in values)])
        head = ["method", "sparsity", "pruned in both", "by chance", "alike"]
        yield Grid(f"{' and '.join(models)}: similarity of masks", notes, head, lines)


def _failed(rows: Sequence[Row]) -> Iterator[Grid]:
    failed = [row for row in rows if row["failed"]]
    if failed:
        names = ("model", "method", "pattern", "seed", "failed")
        yield Grid("Failed cells", [], list(names), [[str(row[name]) for name in names] for row in failed])


def _in_order(patterns: Iterable[str]) -> list[str]:
    """Return patterns by sparsity, N:M after a sparsity that is the same."""
    return sorted(patterns, key=lambda pattern: (on_axis(pattern), ":" in pattern))


def _label(pattern: str) -> str:
    return f"{pattern} ({_percent(on_axis(pattern))})" if ":" in pattern else _percent(on_axis(pattern))


def _bend(knee: Knee) -> str:
    return f"{_percent(knee.sparsity)}{' or more' if knee.at_end else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.10g}%"
