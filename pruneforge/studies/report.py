"""The report of a study: its pages, Markdown, LaTeX, the rows as CSV and JSON, and the recipe of each cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from pruneforge.checkpoint.durable import write_text
from pruneforge.runs.places import STUDY_FILE
from pruneforge.studies.costs import as_costs
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.grids import failed_grid, loss_grid, main_grid, number, points_grid
from pruneforge.studies.layers import layers_of
from pruneforge.studies.markup import Section, as_latex, as_markdown
from pruneforge.studies.noise import Items, items
from pruneforge.studies.page import as_html, shown_methods
from pruneforge.studies.plan import Cell
from pruneforge.studies.results import Row, as_csv, rows_of
from pruneforge.studies.study import Study
from pruneforge.studies.tables import Table, tables_of

RESULTS_FILE, MARKDOWN_FILE = "results.json", "report.md"

RECIPES = "recipes"
"""Folder of the recipes below the study's, each named by its hash."""


def write_report(study: Study, cells: Sequence[Cell], folder: Path) -> list[Row]:
    """Write results and report into a study's folder, and return the rows.

    Nothing in them differs between a study that was stopped and one that was not; times and memory are in
    `measured.csv` and `measured.html` alone.
    """
    held = StudyFolder(folder)
    rows, measured = rows_of(cells, held), _measured(cells, held)
    tables = tables_in(study, cells, rows, folder)
    layers = {table.model: layers_of(cells, held, table.model, table.middle) for table in tables}
    shown = {model: found for model, found in layers.items() if found is not None}
    sections = _sections(rows, tables, study)
    text = (folder / STUDY_FILE).read_text(encoding="utf-8")
    write_text(as_csv(rows), folder / "results.csv")
    write_text(as_csv(measured), folder / "measured.csv")
    write_text(as_markdown(sections), folder / MARKDOWN_FILE)
    write_text(as_latex(sections), folder / "report.tex")
    write_text(as_html(study, text, rows, tables, shown), folder / "report.html")
    write_text(as_costs(study, tables, measured), folder / "measured.html")
    _write_recipes(cells, folder / RECIPES)
    write_text(json.dumps(rows, indent=1) + "\n", folder / RESULTS_FILE)  # last: what it tells of is in all of them
    return rows


def tables_in(study: Study, cells: Sequence[Cell], rows: Sequence[Row], folder: Path) -> list[Table]:
    """Return the tables of a study, with what the outcomes of items in its folder say of differences.

    Args:
        study: The study.
        cells: Its cells.
        rows: What was found.
        folder: Its folder.
    """
    held = StudyFolder(folder)
    by_place = {(cell.model, cell.method, str(cell.pattern), cell.seed): cell for cell in cells}

    def items_of(row: Row) -> Items | None:
        return items(held, by_place[row["model"], row["method"], row["pattern"], row["seed"]], row["task_number"])

    return tables_of(rows, study.compared_with, items_of)


def _sections(rows: Sequence[Row], tables: Sequence[Table], study: Study) -> list[Section]:
    """Return title, text and table of each section of the report's plain forms."""
    methods = shown_methods(study)
    marks = methods.baseline, methods.controls
    found = [
        ("All models: increase of the loss", "In percent of the dense model's.", loss_grid(tables, *marks)),
        ("All models: change from the dense model", "In percentage points.", points_grid(tables, *marks)),
    ]
    for table in tables:
        dense = f"Dense: {number(table.dense, table.share)}. " if table.dense is not None else ""
        better = f"{'Higher' if table.higher_is_better else 'Lower'} is better. "
        grid = main_grid(table, *marks)
        found.append((f"{table.model}: {table.heading}", f"{dense}{better}{table.protocol}.", grid))
    found.append(("Failed runs", "They are tried again the next time the study runs.", failed_grid(rows)))
    return [(title, text, grid) for title, text, grid in found if grid is not None]


def _measured(cells: Sequence[Cell], held: StudyFolder) -> list[Row]:
    found = []
    for cell in cells:
        measured = held.measured(cell)
        if measured:
            place = {"model": cell.model, "method": cell.method, "pattern": str(cell.pattern), "seed": cell.seed}
            found.append(place | {name: value for name, value in measured.items() if name != "stages"})
    return found


def _write_recipes(cells: Sequence[Cell], folder: Path) -> None:
    """Write the recipe of each cell, and remove those of cells that are no longer of the study."""
    folder.mkdir(exist_ok=True)
    names = {f"{cell.fingerprint()}.yaml": cell.recipe for cell in cells}
    for name, recipe in names.items():
        write_text(
            yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False), folder / name
        )
    for left in folder.glob("*.yaml"):
        if left.name not in names:
            left.unlink()
