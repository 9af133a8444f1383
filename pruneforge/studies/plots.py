"""Pictures of a study, as SVG that stands in a page or alone; what is black follows the colour of the page's text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruneforge.interfaces.patterns import parse_pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes


INK = "#010203"
"""Colour that is replaced by that of the text around the picture."""

COLOURS = ("#3b7dd8", "#d9782d", "#2a9d72", "#c9495f", "#8a6fc4", "#8c6d46", "#2b9fb3", "#b8862b")
"""Colours of methods, each readable on white and on black."""

GREY = "#878e99"
"""Colour of controls."""

DASHES = ("", "6 3", "2 2", "8 2 2 2")
UNLIKE = 3
"""Losses that differ by more than this factor are drawn on a logarithmic axis."""

ROOM = 0.6
"""How far beyond the methods, as a share of their span, a picture goes on for controls that lie outside."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in all pictures of a study.

    Attributes:
        colour: Its colour.
        dashes: Lengths of dashes and gaps, as SVG writes them; empty for a solid line.
        hollow: Whether its markers are, as those of controls.
    """

    colour: str
    dashes: str
    hollow: bool = False

    def line(self) -> dict[str, Any]:
        """Return the properties of its line and markers to matplotlib."""
        dashes = (0, tuple(float(each) for each in self.dashes.split())) if self.dashes else "solid"
        return {"color": self.colour, "linestyle": dashes, **self.points()}

    def points(self) -> dict[str, Any]:
        """Return the properties of its markers to matplotlib."""
        face = "none" if self.hollow else self.colour
        return {"color": self.colour, "markerfacecolor": face, "markeredgewidth": 1}


def styles_of(methods: Sequence[str], controls: Collection[str]) -> dict[str, Style]:
    """Return the style of each method: a colour of its own, and grey dashes for controls."""
    colours = [(colour, dashes) for dashes in DASHES for colour in COLOURS]
    own = [method for method in methods if method not in controls]
    found = {method: Style(*colours[number % len(colours)]) for number, method in enumerate(own)}
    grey = [method for method in methods if method in controls]
    return found | {method: Style(GREY, DASHES[1 + number % 3], True) for number, method in enumerate(grey)}


def on_axis(pattern: str) -> float:
    """Return the sparsity of a pattern as a table names it, "0.5" or "2:4"."""
    return parse_pattern(None, pattern, "row").sparsity if ":" in pattern else float(pattern)


def frame(values: Sequence[tuple[float, float | None, bool]], losses: bool) -> tuple[float, float, bool]:
    """Return the ends of an axis that fits the methods, and whether it is logarithmic, as for losses of unlike size.

    Args:
        values: Means, deviations, and whether they are a control's.
        losses: Whether lower values are better.
    """
    reach = [
        (mean + sign * (deviation or 0.0), control)
        for mean, deviation, control in values
        for sign in (-1, 1)
        if math.isfinite(mean)
    ]
    inner = [value for value, control in reach if not control] or [value for value, _ in reach] or [0.0]
    log = losses and min(inner) > 0 and max(inner) > UNLIKE * min(inner)
    scale: Callable[[float], float] = math.log if log else float
    low, high = scale(min(inner)), scale(max(inner))
    room = ROOM * ((high - low) or 1.0)
    every = [scale(value) for value, _ in reach if not log or value > 0]
    near = [value for value in every if low - room <= value <= high + room]
    low, high = min(near, default=low), max(near, default=high)
    margin = 0.06 * ((high - low) or 1.0)
    return (math.exp(low - margin), math.exp(high + margin), True) if log else (low - margin, high + margin, False)


def set_frame(axes: Axes, low: float, high: float, log: bool) -> None:
    """Give the vertical axis its ends, and few ticks if it is logarithmic."""
    if log:
        axes.set_yscale("log")
        _few_ticks(axes, low, high)
    axes.set_ylim(low, high)


def _few_ticks(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic axis by round numbers, more of them where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(high / low) if high > low > 0 else 0
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 3 else (1,))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def drawn(
    draw: Callable[[Axes], None],
    size: tuple[float, float],
    name: str,
    place: tuple[float, float, float, float] | None = None,
) -> str:
    """Return a picture as SVG that is the same whenever it is drawn.

    Args:
        draw: Draws on axes.
        size: Width and height, inches.
        name: What the picture is called, unlike any other on the page.
        place: Left, bottom, width and height of the axes as shares of the picture; chosen to fit if left out, which
            takes longer.
    """
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,  # ids do not change from run to run, nor repeat on a page
        "text.parse_math": False,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.alpha": 0.13,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        **dict.fromkeys(inked, INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout=None if place else "constrained")
        draw(figure.add_axes(place) if place else figure.add_subplot())
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = picture.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # What a page does not need: licences, comments, rules for all that is on it, and ids that would repeat.
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL
    )
    return re.sub(r' id="[a-zA-Z0-9.]+_\d+"|(?<=\n) +', "", text)
