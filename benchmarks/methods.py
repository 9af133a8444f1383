"""The results page of the shipped study of methods: metrics, allocators, refiners, recoveries and their compositions.

    pruneforge compare --preset methods --output methods
    python benchmarks/methods.py methods

from a folder that holds what `pruneforge plugins methods` names. Copies the results to `benchmarks/results/methods`,
and writes `docs/results/methods.md`. A study that is not finished is shown as far as it is; what is missing is a dash.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneforge.runs.provenance import machine, versions
from pruneforge.studies.compare import read_study
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.grids import cell_text, number, pattern_name
from pruneforge.studies.plan import Cell, cells_of
from pruneforge.studies.published import published_numbers
from pruneforge.studies.report import tables_in, write_report
from pruneforge.studies.results import Row
from pruneforge.studies.study import Study
from pruneforge.studies.tables import Table

ROOT = Path(__file__).parents[1]
KEPT = ("study.yaml", "results.csv", "measured.csv", "report.tex")
PUBLISHED = "LLaMA-2 7B"
SAME = {"owl + wanda": "wanda owl", "wanda + dsnot": "wanda + dsnot", "dsnot": "wanda + dsnot"}
"""What the study calls methods that publications call otherwise."""

ABOUT = {
    "stories260K": "A LLaMA of 260 K parameters on TinyStories: one half calibrates, the other is measured. "
    "A model this small has little to spare: differences are larger than in models that people use.",
    "ViT-S": "DINOv2 ViT-S/14 at 112 pixels with a linear head for the ten classes of CIFAR-10, in bfloat16.",
    "SmolLM2-135M": "SmolLM2-135M-Instruct, from a file of 4 bits a weight, on WikiText-2 in bfloat16.",
}


def line(texts: Iterable[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(texts)} |"


def table_lines(table: Table, further: Mapping[str, Callable[[str], str]]) -> list[str]:
    """Return a table of methods by patterns, with further columns by method."""
    heads = ["method", *map(pattern_name, table.patterns), *further]
    lines = [line(heads), line([":-", *["-:"] * (len(heads) - 1)])]
    for method, own in table.lines.items():
        texts = [cell_text(own[each], table.share) if each in own else "–" for each in table.patterns]
        lines.append(line([method, *texts, *(text(method) for text in further.values())]))
    return lines


def layer_error(cells: Sequence[Cell], held: StudyFolder, pattern: str) -> Callable[[str], str]:
    """Return what gives the mean relative error of layers, of a method's first draw at a pattern."""

    def text(method: str) -> str:
        for cell in cells:
            found = held.cell(cell) if (cell.method, str(cell.pattern)) == (method, pattern) else None
            if found and found.get("details"):
                return f"{statistics.fmean(layer['error'] for layer in found['details'].values()):.3f}"
        return "–"

    return text


def seconds(measured: list[dict[str, Any]]) -> str:
    """Return the mean seconds of a run, which is its share of the pass."""
    return f"{statistics.fmean(each['seconds'] / each['runs_in_the_pass'] for each in measured):.1f}"


def runs(measured: list[dict[str, Any]]) -> str:
    """Return the mean number of runs in a pass."""
    return f"{statistics.fmean(each['runs_in_the_pass'] for each in measured):.0f}"


def peak(measured: list[dict[str, Any]]) -> str:
    """Return the highest peak of memory."""
    return f"{max(each['peak_bytes'] for each in measured) / 2**20:,.0f}"


def cost(cells: Sequence[Cell], held: StudyFolder, text: Callable[[list[dict[str, Any]]], str]) -> Callable[[str], str]:
    """Return what gives a cost of a method over all of its runs."""

    def of_method(method: str) -> str:
        known = [found for cell in cells if cell.method == method and (found := held.measured(cell))]
        return text(known) if known else "–"

    return of_method


def won_back(table: Table) -> list[str]:
    """Return how much of what pruning alone lost at the middle pattern each further step wins back, as lines."""
    where, lines = table.middle, []
    for method, own in table.lines.items():
        further = {
            name.removeprefix(method): (own[where].mean - line[where].mean) / (own[where].mean - (table.dense or 0))
            for name, line in table.lines.items()
            if name.startswith(f"{method} + ") and where in line and where in own
        }
        if further:
            shares = ", ".join(f"{100 * share:.0f} % by{name.replace(' +', '', 1)}" for name, share in further.items())
            lines.append(f"- Of what {method} loses at {pattern_name(where)}, won back: {shares}")
    return lines


def model_lines(model: str, tables: Sequence[Table], cells: Sequence[Cell], held: StudyFolder) -> list[str]:
    """Return the section of one model."""
    own = [cell for cell in cells if cell.model == model]
    lines = [f"## {model}", "", ABOUT[model], ""]
    for place, table in enumerate(tables):
        middle = table.middle
        further = {
            f"layer error, {pattern_name(middle)}": layer_error(own, held, middle),
            "seconds": cost(own, held, seconds),
            "runs a pass": cost(own, held, runs),
            "peak, MiB": cost(own, held, peak),
        }
        assert table.dense is not None
        lines += [
            f"### {table.heading}",
            "",
            f"Dense: **{number(table.dense, table.share)}**. "
            f"{'Higher' if table.higher_is_better else 'Lower'} is better.",
            "",
            *table_lines(table, {} if place else further),
            "",
            *won_back(table),
            *(f"- {name}: {text}" for name, text in table.facts if name in ("Draws", "Evaluated on", "Calibrated on")),
            "",
        ]
    return lines


def order_lines(tables: Mapping[str, Table]) -> list[str]:
    """Return the published orders of methods, and those found here among the same methods."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for each in published_numbers():
        if each.model == PUBLISHED and each.measure == "perplexity" and each.method != "dense":
            groups.setdefault((each.source, str(each.pattern)), {})[each.method] = each.value
    lines = [line(["source", "pattern", f"published for {PUBLISHED}", *tables]), line([":-"] * (3 + len(tables)))]
    for (source, pattern), published in groups.items():
        names = {method: SAME.get(method, method) for method in published}
        shown = {
            method for method, name in names.items() if all(pattern in t.lines.get(name, {}) for t in tables.values())
        }
        if len(shown) < 2 or not all(pattern in table.patterns for table in tables.values()):
            continue
        orders = [_order({method: published[method] for method in shown})]
        orders += [
            _order({method: table.lines[names[method]][pattern].mean for method in shown}) for table in tables.values()
        ]
        lines.append(line([source, pattern_name(pattern), *orders]))
    return lines


def _order(values: Mapping[str, float]) -> str:
    return " < ".join(f"{method} {number(values[method], False)}" for method in sorted(values, key=lambda m: values[m]))


def page(study: Study, cells: Sequence[Cell], rows: Sequence[Row], folder: Path) -> str:
    """Return `docs/results/methods.md`."""
    held, tables = StudyFolder(folder), tables_in(study, cells, rows, folder)
    where, used = machine(), versions()
    done = sum(1 for cell in cells if "evaluations" in (held.cell(cell) or {}))
    missing = "" if done == len(cells) else f" **{len(cells) - done} of {len(cells)} runs have not been made yet.**"
    models = [model for model in study.models if any(table.model == model for table in tables)]
    texts = [table for table in tables if table.measure == "perplexity"]
    lines = [
        "# Methods compared",
        "",
        "Made by `pruneforge compare --preset methods` and `benchmarks/methods.py`; the rows are in "
        "[`benchmarks/results/methods`](../../benchmarks/results/methods/results.csv). Every part has its defaults, "
        "but for the step sizes of `perp`, which are for large models. Statistics are those of the dense model, except "
        f"before `reconstruct`, which follows the pruned one.{missing}",
        "",
        "The layer error is `||X (W - W')^T||^2 / ||X W^T||^2`, the mean over layers for the first draw, with X the "
        "inputs of the run: of the dense model, or of the pruned one. It is not what a method that trains makes small. "
        "Seconds are those of a pass over its runs, with loading and evaluation left out; peak memory is that of the "
        "process. Many runs shared the machine with others, one thread each, so these seconds tell orders of "
        "magnitude; methods are timed one by one in [`solvers.json`](../../benchmarks/results/solvers.json).",
        "",
    ]
    for model in models:
        lines += model_lines(model, [table for table in tables if table.model == model], cells, held)
    lines += [
        "## Beside published orders",
        "",
        f"What was published for {PUBLISHED} on WikiText-2, and the same methods here.",
        "",
        *order_lines({table.model: table for table in texts}),
        "",
        f"Machine: {where['processor']}, {where['cores']} cores, "
        f"{', '.join(where['accelerators']) or 'no accelerator'}; torch {used['torch']}, "
        f"transformers {used['transformers']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Copy the results and write the page."""
    folder = Path(sys.argv[1])
    study = read_study(folder / "study.yaml")
    cells = cells_of(study, [])
    rows = write_report(study, cells, folder)
    kept = ROOT / "benchmarks" / "results" / "methods"
    kept.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copyfile(folder / name, kept / name)
    (ROOT / "docs" / "results" / "methods.md").write_text(page(study, cells, rows, folder))


if __name__ == "__main__":
    main()
