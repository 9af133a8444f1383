"""Small pictures of a study, several of which stand side by side, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pruneforge.studies.plots import Style, drawn, frame, set_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float | None, float, float | None]
"""Mean and standard deviation, if there is one, of what is across, then of what is up."""

DOTTED = 12
"""Blocks up to which each has a dot; more would make a large page."""

SMALL, PLACE = (2.3, 1.7), (0.17, 0.13, 0.8, 0.74)
"""Width and height, inches, and where the axes are."""


def panel(
    title: str,
    lines: Mapping[str, Mapping[int, float]],
    styles: Mapping[str, Style],
    ends: tuple[float, float],
    log: bool,
    name: str,
) -> str:
    """Return a small picture of one value a block for each method.

    Args:
        title: What stands above it.
        lines: By method, the value of each block.
        styles: How the methods are drawn.
        ends: Ends of the axis of values, so that several panels compare.
        log: Whether that axis is logarithmic.
        name: What the picture is called, unlike any other on the page.
    """

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for method, line in lines.items():
            marker = "o" if len(line) <= DOTTED else ""
            axes.plot(
                list(line), list(line.values()), marker=marker, markersize=2, linewidth=1.1, **styles[method].line()
            )
        set_frame(axes, *ends, log)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.set_title(title, fontsize=8, loc="left")

    return drawn(draw, SMALL, name, PLACE)


def histogram(title: str, layers: Sequence[Mapping[str, Any]], style: Style, name: str) -> str:
    """Return the distributions of the positive scores of some layers, earlier ones paler; each has an area of 1."""

    def draw(axes: Axes) -> None:
        for number, scores in enumerate(layers):
            counts, low, high = scores["counts"], scores["low"], scores["high"]
            width = (high - low) / len(counts)
            total = sum(counts) * width
            if not total:
                continue  # all scores are alike
            edges = [low + step * width for step in range(len(counts) + 1)]
            alpha = 0.3 + 0.7 * (number + 1) / len(layers)
            axes.stairs([each / total for each in counts], edges, color=style.colour, alpha=alpha, linewidth=1.1)
        axes.set_yticks([])
        axes.set_title(title, fontsize=8, loc="left")

    return drawn(draw, SMALL, name, PLACE)


def scatter(
    points: Mapping[str, Point],
    styles: Mapping[str, Style],
    labels: tuple[str, str],
    losses: bool,
    name: str,
) -> str:
    """Return a quality against a cost, a point for each method; the frame fits those that are no control.

    Args:
        points: By method, what is drawn.
        styles: How the methods are drawn.
        labels: What is across and what is up.
        losses: Whether lower is better of what is up.
        name: What the picture is called, unlike any other on the page.
    """

    def draw(axes: Axes) -> None:
        for method, (x, across, y, up) in points.items():
            axes.errorbar(
                [x],
                [y],
                xerr=[across or 0.0],
                yerr=[up or 0.0],
                marker="o",
                markersize=5,
                elinewidth=0.9,
                capsize=2,
                **styles[method].points(),
            )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.margins(x=0.12)
        set_frame(axes, *frame([(y, up, styles[method].hollow) for method, (_, _, y, up) in points.items()], losses))

    return drawn(draw, (3.6, 2.6), name)
