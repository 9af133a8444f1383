"""Quality against sparsity, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pruneforge.studies.plots import INK, Style, drawn, frame, on_axis, set_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pruneforge.studies.tables import Table

MARKERS = ("D", "s", "^", "v", "P", "X")
"""Of N:M patterns; sparsities have dots."""

APART = 0.008
"""Distance of the markers of two methods at one N:M, as a share of the axis."""

LONGEST = 48
"""Letters of a method's name that the legend shows."""

DENSE: dict[str, Any] = {"xytext": (-2, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8}
"""Where the name of the dense model's line is."""


def curve(
    table: Table,
    styles: Mapping[str, Style],
    name: str,
    knees: Mapping[str, float] | None = None,
    caption: str = "",
) -> str:
    """Return quality against sparsity, as SVG; an empty text with fewer than two sparsities.

    N:M patterns are markers at their sparsity, and the dense model is a line. The frame fits the methods; the legend
    says which controls have points outside of it.

    Args:
        table: What to draw.
        styles: How the methods are drawn.
        name: What the picture is called, unlike any other on the page.
        knees: For methods, the sparsity at which their curve has a star; 0 is the dense model.
        caption: A line above the picture.
    """
    places = sorted({100 * on_axis(pattern) for pattern in table.patterns})
    if len(places) < 2:
        return ""
    scale = 100 if table.share else 1
    values = {
        method: {pattern: (scale * each.mean, scale * (each.deviation or 0.0)) for pattern, each in line.items()}
        for method, line in table.lines.items()
    }
    dense = None if table.dense is None else scale * table.dense
    known = [(*each, styles[method].hollow) for method, line in values.items() for each in line.values()]
    low, high, log = frame(known + ([] if dense is None else [(dense, 0.0, False)]), not table.higher_is_better)
    grouped = [pattern for pattern in table.patterns if ":" in pattern]
    markers = {pattern: MARKERS[number % len(MARKERS)] for number, pattern in enumerate(grouped)}

    def draw(axes: Axes) -> None:
        labels = []
        for number, (method, line) in enumerate(values.items()):
            inside = {pattern: low <= mean <= high for pattern, (mean, _) in line.items()}
            aside = (number - (len(values) - 1) / 2) * (places[-1] - places[0]) * APART
            _line(axes, line, inside, styles[method], markers, aside)
            knee = (knees or {}).get(method)
            if knee is not None and dense is not None:
                height = line[str(knee)][0] if knee else dense
                axes.plot([100 * knee], [height], "*", color=styles[method].colour, markersize=11, zorder=3)
            short = method if len(method) <= LONGEST else f"{method[:LONGEST]}…"
            labels.append(short if all(inside.values()) else f"{short} (outside)")
        if dense is not None:
            axes.axhline(dense, color=INK, linewidth=0.8, alpha=0.7)
            axes.annotate("dense", (1, dense), xycoords=("axes fraction", "data"), **DENSE)
        if len(places) <= 9:
            axes.set_xticks(places, [f"{place:.10g}" for place in places])
        set_frame(axes, low, high, log)
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel(f"{table.measure}, %" if table.share else table.measure)
        axes.set_title(caption, loc="left", fontsize=8)
        _legend(axes, [styles[method] for method in values], labels, markers)

    return drawn(draw, (4.8, 3.4), name)


def _line(
    axes: Axes,
    line: Mapping[str, tuple[float, float]],
    inside: Mapping[str, bool],
    style: Style,
    markers: Mapping[str, str],
    aside: float,
) -> None:
    """Draw a method: a line through its sparsities, and a marker for each N:M, a little aside of the others'."""
    sparsities = sorted((pattern for pattern in line if pattern not in markers), key=float)
    for patterns in (sparsities, *([pattern] for pattern in line if pattern in markers)):
        axes.errorbar(
            [100 * on_axis(each) + aside * (each in markers) for each in patterns],
            [line[each][0] for each in patterns],
            yerr=[line[each][1] if inside[each] else 0.0 for each in patterns],
            marker="o" if patterns is sparsities else markers[patterns[0]],
            markersize=4 if patterns is sparsities else 5,
            linewidth=1.3,
            elinewidth=0.9,
            capsize=2,
            **style.line(),
        )


def _legend(axes: Axes, styles: Sequence[Style], labels: Sequence[str], markers: Mapping[str, str]) -> None:
    """Say what is what, below the axes, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", markersize=4, **style.line()) for style in styles]
    handles += [Line2D([], [], marker=each, markersize=5, linestyle="none", color=INK) for each in markers.values()]
    # matplotlib leaves out labels that begin with an underscore.
    texts = [" " * text.startswith("_") + text for text in (*labels, *markers)]
    columns = max(1, min(4, 84 // (10 + max(map(len, texts)))))
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(
        handles, texts, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, handlelength=2.6
    )
