"""What a run is, for the loop that works on it and the plugins that observe it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.patterns import Pattern, Scope, Unstructured
from pruneforge.interfaces.recipe import Propagate, PruneRecipe
from pruneforge.interfaces.selection import Threshold
from pruneforge.interfaces.statistics import Statistic
from pruneforge.profile import Profile


@dataclass(frozen=True)
class BlockResult:
    """One finished block.

    Attributes:
        index: Position among the blocks, from 0.
        block: The block.
        masks: Mask [out, in] of each of its layers on the CPU, by full name; `True` keeps.
        pruned: How many weights of each layer are pruned, by full name.
        notes: What the metric noted of its layers, one line each.
        updated: Names of the layers whose kept weights the metric changed too.
    """

    index: int
    block: Block
    masks: dict[str, Tensor]
    pruned: dict[str, int]
    notes: list[str] = field(default_factory=list)
    updated: frozenset[str] = frozenset()


class Output:
    """Where the finished blocks of a run go; this one keeps nothing."""

    def add(self, result: BlockResult) -> None:
        """Take a finished block, while its weights are still there. They may be rounded as they will be stored."""

    def settle(self) -> None:
        """Return when the weights of the blocks taken so far are no longer read, since others will replace them."""


@dataclass
class Run:
    """One pruned model: what is asked for, what the loop works on, and what came of it.

    Several runs can share one pass over the calibration data; each has its own recipe, metric, pattern and output.

    Attributes:
        recipe: The settings that give this one alone.
        metric: The metric, with its options.
        pattern: The pattern asked for, with the metric's scope.
        folder: The output folder, or `None` for a result in memory.
        blocks: The model's blocks in the order they run.
        excluded: Layers of the blocks that the user left out; they stay dense.
        warnings: What a user has to know, one line each.
        profile: Where the time goes; runs that share forward passes share it.
        output: Where finished blocks go.
        finished: How many blocks, from the first, an earlier process of the same run has finished.
        pruned: For each finished layer, by full name, how many of its weights are pruned. Its mask is in the
            `BlockResult` of its block; the engine owns it, and nothing infers a mask from zeros.
        activations: Most bytes of hidden states that waited at a time, by place (device, host, disk).
        threshold: Of the scores of the whole model, once it is known; for scope "model" alone.
        gradient_cache: How many gradient statistics were found there, and how many bytes were added.
        report: The report, once the run is finished.
    """

    recipe: PruneRecipe
    metric: Metric
    pattern: Pattern
    folder: Path | None = None
    blocks: list[Block] = field(default_factory=list)
    excluded: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    profile: Profile = field(default_factory=Profile)
    output: Output = field(default_factory=Output)
    finished: int = 0
    pruned: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    gradient_cache: dict[str, int] = field(default_factory=dict)
    threshold: Threshold | None = None
    report: dict[str, Any] | None = None

    @property
    def propagate(self) -> Propagate:
        """Whether calibration sees the earlier blocks pruned or dense."""
        return self.recipe.propagate

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.recipe.seed

    @property
    def scope(self) -> Scope | None:
        """The comparison group of an unstructured pattern."""
        return self.pattern.scope if isinstance(self.pattern, Unstructured) else None


def required_statistics(runs: Iterable[Run]) -> tuple[type[Statistic], ...]:
    """Return the statistics that the metrics of any of the runs require, each once."""
    return tuple(dict.fromkeys(kind for run in runs for kind in run.metric.requires))
