"""What noise explains of a difference: paired bootstrap intervals over calibration draws and over items.

Two methods that saw the same calibration draws and were evaluated on the same items are compared pair by pair, so that
what all methods share cancels. Intervals are 95 % percentile intervals of the mean (Efron, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.plan import Cell

RESAMPLES = 2000
"""Bootstrap samples of a difference."""

AT_ONCE = 10_000_000
"""Numbers that are held at once while resampling."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Items:
    """What one evaluation gave for each item of its data, such as an image or a question.

    Attributes:
        measure: What the values are; their mean is the result.
        ids: Hash of what the items are called, in their order.
        values: A number for each item, [items].
    """

    measure: str
    ids: str
    values: NDArray[Any]


@dataclass(frozen=True)
class Draws:
    """What a method gave at one pattern on one task, by seed of the calibration draw.

    Attributes:
        values: The measure.
        items: The items, of those draws of which they are known.
    """

    values: Mapping[int, float]
    items: Mapping[int, Items] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The mean difference of a method to another one on the same draws.

    Attributes:
        mean: The mean.
        draws: Number of draws that both have.
        over_draws: Its interval over draws; `None` with fewer than two.
        items: Number of items.
        over_items: The interval over items, each item's difference averaged over the draws; `None` if unknown.
        note: Why there is none over items although items are known, or an empty text.
    """

    mean: float
    draws: int
    over_draws: Interval | None
    items: int = 0
    over_items: Interval | None = None
    note: str = ""

    @property
    def is_noise(self) -> bool:
        """Whether draws or items may explain it: an interval holds zero, or there is none over draws."""
        return self.over_draws is None or any(
            each is not None and each[0] <= 0 <= each[1] for each in (self.over_draws, self.over_items)
        )


def items(held: StudyFolder, cell: Cell, task: int) -> Items | None:
    """Return the items of a cell's evaluation, or `None` if they were not kept.

    Args:
        held: The study's folder.
        cell: The cell.
        task: Number of the task among the model's.
    """
    found = held.items(cell, task)
    return Items(found["measure"], found["ids"], np.asarray(found["values"])) if found else None


def difference(one: Draws, other: Draws) -> Difference | None:
    """Return how much one method gave more than the other; `None` if they share no draw."""
    shared = [seed for seed in one.values if seed in other.values]
    if not shared:
        return None
    differences = [one.values[seed] - other.values[seed] for seed in shared]
    mean, over_draws = math.fsum(differences) / len(differences), interval(differences)
    pairs = [(one.items[seed], other.items[seed]) for seed in shared if seed in one.items and seed in other.items]
    if not pairs:
        return Difference(mean, len(shared), over_draws)
    if len({(each.measure, each.ids, len(each.values)) for pair in pairs for each in pair}) > 1:
        return Difference(mean, len(shared), over_draws, note="evaluated on different items")
    by_item = np.mean([of_one.values.astype(float) - of_other.values for of_one, of_other in pairs], axis=0)
    return Difference(mean, len(shared), over_draws, len(by_item), interval(by_item))


def interval(differences: Sequence[float] | NDArray[Any]) -> Interval | None:
    """Return the 95 % bootstrap interval of the mean of paired differences; `None` of fewer than two."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        return float(distinct[0]), float(distinct[0])
    random = np.random.default_rng(0)
    if len(distinct) * 8 < len(values):
        # Right or wrong, averaged over few draws: how often each value is drawn says all, and is drawn at once.
        means = random.multinomial(len(values), counts / len(values), RESAMPLES) @ distinct / len(values)
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)
    from scipy.stats import bootstrap

    batch = max(1, AT_ONCE // len(values))
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=random)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
