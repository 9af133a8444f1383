"""The tables of a study: methods by patterns, for each model and task, with what draws say together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pruneforge.studies.noise import Difference, Draws, Items, difference
from pruneforge.studies.results import TASK_PROTOCOL, Row

ItemsOf = Callable[[Row], Items | None]
"""Gives the items that a row's evaluation kept, or `None`."""


def no_items(row: Row) -> Items | None:
    """Give no items, where none were kept."""
    return None


@dataclass(frozen=True)
class Summary:
    """One method at one pattern on one task, over all calibration draws.

    Attributes:
        values: The measure, by seed.
        losses: The increase of the loss relative to the dense model's, by seed; empty where the task has no loss.
        difference: To the baseline on the same draws; `None` for the baseline.
        best: Whether no other method is better by more than noise explains; never with one draw.
        published: The published number, or `None`.
    """

    values: Mapping[int, float]
    losses: Mapping[int, float]
    difference: Difference | None
    best: bool
    published: float | None

    @property
    def mean(self) -> float:
        """The mean of the measure over draws."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """The standard deviation, with one draw less in the divisor; `None` with one draw."""
        return deviation(self.values)

    @property
    def loss_increase(self) -> float | None:
        """The mean increase of the loss relative to the dense model's; `None` where the task has no loss."""
        return statistics.fmean(self.losses.values()) if self.losses else None


def deviation(values: Mapping[int, float]) -> float | None:
    """Return the standard deviation over draws, `None` of one draw."""
    return statistics.stdev(values.values()) if len(values) > 1 else None


@dataclass(frozen=True)
class Table:
    """Methods by patterns, for one model and task.

    Attributes:
        model: Name of the model.
        task: The task.
        measure: What the cells hold.
        higher_is_better: Whether a higher one is better.
        share: Whether it is a share, shown in percent.
        dense: What the dense model has.
        published_dense: What was published for it, or `None`.
        patterns: The columns.
        draws: Number of calibration draws that were asked for.
        failed: Methods and patterns of which a draw failed.
        lines: For each method its summaries, by pattern; those without a result are left out.
        facts: What the numbers were measured on, and on what the models were calibrated: names and texts.
        rows: The rows that it is made of.
    """

    model: str
    task: str
    measure: str
    higher_is_better: bool
    share: bool
    dense: float | None
    published_dense: float | None
    patterns: list[str]
    draws: int
    failed: frozenset[tuple[str, str]]
    lines: dict[str, dict[str, Summary]]
    facts: list[tuple[str, str]]
    rows: list[Row]

    @property
    def title(self) -> str:
        """What is measured, on which task."""
        return self.measure if self.measure == self.task else f"{self.measure}, {self.task}"

    @property
    def heading(self) -> str:
        """The title, with the unit."""
        return f"{self.title}, %" if self.share else self.title

    @property
    def protocol(self) -> str:
        """The facts in one line."""
        return "; ".join(f"{name}: {text}" for name, text in self.facts)

    def without(self, method: str, pattern: str) -> str:
        """Return why there is no summary of a method at a pattern: a word if it failed, a dash if nobody asked."""
        return "failed" if (method, pattern) in self.failed else "–"

    @property
    def best(self) -> dict[str, set[str]]:
        """By pattern, the methods that no other is better than beyond the noise."""
        return {
            pattern: {method for method, line in self.lines.items() if pattern in line and line[pattern].best}
            for pattern in self.patterns
        }

    @property
    def middle(self) -> str:
        """The pattern to show where one must do: the one in the middle of the sparsities, or of all if there are none.

        N:M patterns constrain masks beside their sparsity, so they are not taken where there is a choice.
        """
        sparsities = sorted((each for each in self.patterns if ":" not in each), key=float)
        chosen = sparsities or self.patterns
        return chosen[len(chosen) // 2]


def tables_of(rows: Sequence[Row], baseline: str, items_of: ItemsOf = no_items) -> list[Table]:
    """Return a table for each model and task that has results.

    Args:
        rows: What the cells found.
        baseline: Name of the method that the others are compared with.
        items_of: Where items come from; without them differences are tested over draws alone.
    """
    tables = []
    for model, number in dict.fromkeys((row["model"], row["task_number"]) for row in rows if not row["failed"]):
        of_model = [row for row in rows if row["model"] == model]
        of_task = [row for row in of_model if not row["failed"] and row["task_number"] == number]
        methods, patterns, seeds = (list(dict.fromkeys(row[name] for row in of_model)) for name in PLACE)
        lines: dict[str, dict[str, Summary]] = {method: {} for method in methods}
        first = of_task[0]
        for pattern in patterns:
            known = [row for row in of_task if row["pattern"] == pattern and row["value"] is not None]
            for method, summary in _column(known, baseline, first["higher_is_better"], items_of).items():
                lines[method][pattern] = summary
        names = ("task", "measure", "higher_is_better", "share", "dense", "published_dense")
        tables.append(
            Table(
                model=model,
                patterns=patterns,
                draws=len(seeds),
                failed=frozenset((row["method"], row["pattern"]) for row in of_model if row["failed"]),
                lines=lines,
                facts=facts_of(of_task),
                rows=of_task,
                **{name: first[name] for name in names},
            )
        )
    return tables


PLACE = ("method", "pattern", "seed")
"""Columns of a row that say which cell of its model it is."""


def _column(rows: Sequence[Row], baseline: str, higher: bool, items_of: ItemsOf) -> dict[str, Summary]:
    """Return the summary of each method, by rows of one model, task and pattern."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    drawn = {method: _draws(own, items_of) for method, own in groups.items()}
    winners = _winners(drawn, higher)
    found = {}
    for method, own in groups.items():
        losses = {row["seed"]: row["loss_increase"] for row in own if row["loss_increase"] is not None}
        versus = difference(drawn[method], drawn[baseline]) if method != baseline and baseline in drawn else None
        found[method] = Summary(drawn[method].values, losses, versus, method in winners, own[0]["published"])
    return found


def _draws(rows: Sequence[Row], items_of: ItemsOf) -> Draws:
    kept = {row["seed"]: items_of(row) for row in rows}
    return Draws(
        {row["seed"]: float(row["value"]) for row in rows},
        {seed: items for seed, items in kept.items() if items is not None},
    )


def _winners(drawn: Mapping[str, Draws], higher: bool) -> set[str]:
    """Return the methods that are not worse than the best one by more than draws and items explain."""
    if not drawn:
        return set()
    means = {method: statistics.fmean(draws.values.values()) for method, draws in drawn.items()}
    best = (max if higher else min)(means, key=lambda method: means[method])
    if len(drawn[best].values) < 2:
        return set()  # one draw says nothing of noise
    versus = {method: difference(draws, drawn[best]) for method, draws in drawn.items() if method != best}
    return {best} | {method for method, each in versus.items() if each is None or each.is_noise}


def facts_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return what rows of one model and task were measured on and calibrated with, as names and texts."""
    said = [(name, _said([(row["method"], text(row)) for row in rows])) for name, text in FACTS.items()]
    seeds = ", ".join(dict.fromkeys(str(row["seed"]) for row in rows))
    return [("Draws", f"seeds {seeds}"), *((name, text) for name, text in said if text)]


def _evaluated(row: Row) -> str:
    values = {name: row[name] for name in TASK_PROTOCOL if row.get(name) is not None}
    texts = (f"{value:,}" if isinstance(value, int) else str(value) for value in values.values())
    return _joined(row["data"], *(f"{name.replace('_', ' ')} {text}" for name, text in zip(values, texts, strict=True)))


def _calibrated(row: Row) -> str:
    plural = "" if row["samples"] == 1 else "s"
    samples = f"{row['samples']:,} sample{plural} of {row['calibration'] or 'no data'}"
    length = f"{row['seqlen']:,} tokens each" if row["seqlen"] else ""
    tokens = row.get("calibration_tokens")
    return _joined(
        samples, length, f"{tokens:,} tokens in all" if tokens else "", row["source_options"], row["streams"]
    )


FACTS: dict[str, Callable[[Row], str]] = {
    "Model": lambda row: str(row["reference"]),
    "Task": lambda row: _joined(row["task"], row["task_options"]),
    "Evaluated on": _evaluated,
    "Calibrated on": _calibrated,
    "Scope": lambda row: str(row["scope"]),
    "Propagate": lambda row: str(row["propagate"]),
    "Dtype": lambda row: str(row["dtype"]),
    "Versions": lambda row: str(row["versions"]),
}
"""What a table says of its protocol."""


def _said(texts: Sequence[tuple[str, str]]) -> str:
    """Return what methods have, and which have what if they differ; what has none, such as a scope, is left out."""
    methods: dict[str, list[str]] = {}
    for method, text in texts:
        if text:
            methods.setdefault(text, []).append(method)
    if len(methods) == 1:
        return next(iter(methods))
    return "; ".join(f"{text} ({', '.join(dict.fromkeys(own))})" for text, own in methods.items())


def _joined(*texts: str) -> str:
    return ", ".join(text for text in texts if text)
