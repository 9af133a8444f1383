"""Pictures of a study, as SVG to stand in a page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruneforge.studies.report import Table


def curve(table: Table) -> str:
    """Return quality against sparsity, with the dense model's as a line; an empty text with fewer than two."""
    sparsities = [pattern for pattern in table.patterns if ":" not in pattern]
    if len(sparsities) < 2:
        return ""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    # Text stays text, and ids do not change from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pruneforge", "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for method, line in table.lines.items():
            known = sorted((float(each), line[each]) for each in sparsities if each in line)
            axes.errorbar(
                [100 * x for x, _ in known],
                [each.mean for _, each in known],
                yerr=[each.deviation or 0.0 for _, each in known],
                label=method,
                marker="o",
                markersize=3,
                linewidth=1.2,
                capsize=2,
            )
        if table.dense is not None:
            axes.axhline(table.dense, color="gray", linestyle="dashed", linewidth=1, label="dense")
        if not table.higher_is_better:
            axes.set_yscale("log")
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel(table.measure)
        axes.legend(fontsize=8, frameon=False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = picture.getvalue()
    return text[text.index("<svg") :]
