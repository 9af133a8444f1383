"""Pictures of a study, as SVG to stand in a page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pruneforge.interfaces.patterns import parse_pattern

if TYPE_CHECKING:
    from pruneforge.studies.report import Table


def on_axis(pattern: str) -> float:
    """Return the sparsity of a pattern as a table names it, "0.5" or "2:4"."""
    return parse_pattern(None, pattern, "row").sparsity if ":" in pattern else float(pattern)


def curve(table: Table, knees: Mapping[str, float] | None = None, caption: str = "") -> str:
    """Return quality against sparsity; an empty text with fewer than two sparsities.

    N:M patterns are marks at their sparsity, and the dense model is a line.

    Args:
        table: What to draw.
        knees: For methods, the sparsity at which their curve has a star; 0 is the dense model.
        caption: A line above the picture.
    """
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
        marks = dict(zip([each for each in table.patterns if ":" in each], itertools.cycle("sD^vP"), strict=False))
        for method, line in table.lines.items():
            known = sorted((float(each), line[each]) for each in sparsities if each in line)
            drawn = axes.errorbar(
                [100 * x for x, _ in known],
                [each.mean for _, each in known],
                yerr=[each.deviation or 0.0 for _, each in known],
                label=method,
                marker="o",
                markersize=3,
                linewidth=1.2,
                capsize=2,
            )
            color = drawn.lines[0].get_color()
            for pattern, marker in marks.items():
                if pattern in line:
                    axes.plot(100 * on_axis(pattern), line[pattern].mean, marker, color=color, fillstyle="none")
            knee = (knees or {}).get(method)
            if knee is not None and table.dense is not None:
                height = dict(known)[knee].mean if knee else table.dense
                axes.plot(100 * knee, height, "*", color=color, markersize=12, markeredgecolor="white", zorder=3)
        for pattern, marker in marks.items():
            axes.plot([], [], marker, color="gray", fillstyle="none", label=pattern)
        if table.dense is not None:
            axes.axhline(table.dense, color="gray", linestyle="dashed", linewidth=1, label="dense")
        if not table.higher_is_better:
            axes.set_yscale("log")
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel(table.measure)
        axes.set_title(caption, loc="left", fontsize=8)
        axes.legend(fontsize=8, frameon=False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = picture.getvalue()
    return text[text.index("<svg") :]
