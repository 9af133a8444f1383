"""The knee of a curve: how far a model can be pruned and stay as good as it was, by a stated rule.

Jaiswal et al. (The Emergence of Essential Sparsity in Large Pre-trained Models, 2023) look for the sparsity beyond
which quality drops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pruneforge.errors import PruneForgeError
from pruneforge.studies.results import Row
from pruneforge.studies.tables import Summary, Table

ROUNDING = 1e-9
"""By how much a difference of two shares may be off."""


@dataclass(frozen=True)
class Rule:
    """How much worse than the dense model a pruned one may be.

    Attributes:
        points: Percentage points of a share, such as an accuracy.
        loss_increase: Increase of the loss relative to the dense model's, for tasks whose measure is no share.
    """

    points: float = 1.0
    loss_increase: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise PruneForgeError(f"`{name}` {value} must be a number from 0 on")

    def limit(self, table: Table) -> float:
        """Return what a model may lose on a table's task."""
        return self.points if table.share else self.loss_increase

    def lost(self, table: Table, summary: Summary) -> float | None:
        """Return what a model lost on a table's task; `None` if it reports neither a share nor a loss."""
        if not table.share:
            return summary.loss_increase
        if table.dense is None:
            return None
        return 100 * (table.dense - summary.mean) * (1 if table.higher_is_better else -1)

    def words(self, table: Table) -> str:
        """Return the rule for a table's task, as what a model has that stays within it."""
        if not table.share:
            return f"a loss at most {100 * self.loss_increase:g}% above the dense model's"
        side = "below" if table.higher_is_better else "above"
        unit = "percentage point" if self.points == 1 else "percentage points"
        return f"{table.measure} at most {self.points:g} {unit} {side} the dense model's"


@dataclass(frozen=True)
class Knee:
    """How far a method prunes a model within the rule.

    Attributes:
        model: Name of the model.
        task: The task.
        method: Name of the method.
        sparsity: The largest sparsity of the sweep such that it and every smaller one stay within the rule; 0 is the
            dense model.
        at_end: Whether the sweep ends there, and the model might be pruned further.
    """

    model: str
    task: str
    method: str
    sparsity: float
    at_end: bool


def knee(lost: Mapping[float, float | None], limit: float) -> float:
    """Return the largest sparsity such that it and every smaller one lose at most `limit`; 0 if there is none.

    Args:
        lost: What a model lost at each sparsity; `None` where that is not known.
        limit: The most that it may lose.
    """
    reached = 0.0
    for sparsity in sorted(lost):
        loss = lost[sparsity]
        if loss is None or not loss <= limit + ROUNDING:  # NaN is not within either
            break
        reached = sparsity
    return reached


def knees(tables: Sequence[Table], rows: Sequence[Row], sparsities: Sequence[float], rule: Rule) -> list[Knee]:
    """Return the knee of each curve; tasks that report neither a share nor a loss have none.

    A curve is the mean over calibration draws. Where one of them failed, it is not known to stay within the rule.

    Args:
        tables: What the study found.
        rows: The same, cell by cell.
        sparsities: The sparsities that were asked for.
        rule: The rule.
    """
    failed = {(row["model"], row["method"], row["pattern"]) for row in rows if row["failed"]}
    found = []
    for table in tables:
        for method, line in table.lines.items():
            known = {sparsity: line[str(sparsity)] for sparsity in sparsities if str(sparsity) in line}
            lost = {sparsity: rule.lost(table, summary) for sparsity, summary in known.items()}
            if all(each is None for each in lost.values()):
                continue
            for sparsity in sparsities:
                if sparsity not in lost or (table.model, method, str(sparsity)) in failed:
                    lost[sparsity] = None
            reached = knee(lost, rule.limit(table))
            found.append(Knee(table.model, table.task, method, reached, reached == sparsities[-1]))
    return found
