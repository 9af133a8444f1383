"""A pruning run, as the loop fills it in and plugins observe it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.allocator import Allocator
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.observer import Observer
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.patterns import Pattern, Scope, Unstructured
from pruneforge.interfaces.recipe import Propagate, PruneRecipe
from pruneforge.interfaces.recovery import Recovery, recovers_models
from pruneforge.interfaces.refiner import Refiner
from pruneforge.interfaces.selection import Threshold
from pruneforge.interfaces.statistics import Requirement, streams_of
from pruneforge.interfaces.summaries import Gram
from pruneforge.profile import Profile

MEASURES_ERROR = Gram
"""The statistic that the error of a layer's output is measured by."""


@dataclass(frozen=True)
class BlockResult:
    """One finished block.

    Attributes:
        index: Position among the blocks, from 0.
        block: The block.
        masks: Mask [out, in] of each of its layers on the CPU, by full name; `True` keeps.
        pruned: Number of pruned weights of each layer, by full name.
        notes: Notes of the metric about its layers, one line each.
        details: What is measured of each layer, by full name: of its scores by the metric, and more if the run asks for
            details.
        updated: Names of the layers whose remaining weights were updated, and of other parameters of the block that
            recovery changed.
        permutations: Order of each layer's columns, int64 [in] on the CPU, in which its mask fits N:M, by full name, if
            the metric permutes.
    """

    index: int
    block: Block
    masks: dict[str, Tensor]
    pruned: dict[str, int]
    notes: list[str] = field(default_factory=list)
    updated: frozenset[str] = frozenset()
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    permutations: dict[str, Tensor] = field(default_factory=dict)


class Output:
    """Where the finished blocks of a run go; this one keeps nothing."""

    def add(self, result: BlockResult) -> None:
        """Take a finished block while its weights are loaded; they may be rounded to the dtype they are stored in."""

    def allocated(self, allocation: dict[str, int]) -> None:
        """Take the run's allocation, before the first block."""

    def settle(self) -> None:
        """Wait until the weights of the blocks taken so far are no longer read; the caller overwrites them next."""


@dataclass
class Run:
    """One pruned model: what is asked for, what the loop works on, and the result.

    Several runs can share one pass over the calibration data; each has its own recipe, metric, pattern and output.

    Attributes:
        recipe: The settings that give this one alone.
        metric: The metric, with its options.
        pattern: The pattern asked for, with the metric's scope.
        folder: The output folder, or `None` for a result in memory.
        allocator: Gives each layer its sparsity; by default all have the pattern's.
        refiners: Change each mask after the metric, in this order.
        recovery: Changes the remaining weights of each block once it is pruned, or of the whole model in the end.
        objective: The loss of gradient statistics; by default the adapter's.
        wants_details: Whether the error and the scores of each layer are measured for the report.
        blocks: The model's blocks in the order they run.
        excluded: Layers of the blocks that the user left out; they stay dense.
        warnings: Warnings for the user, one line each.
        plugins: Distribution, version and source hash of each package that makes the method, as the run began.
        observers: Log the run elsewhere.
        profile: Time and memory by stage and block; runs that share forward passes share it.
        output: What takes the finished blocks.
        finished: Number of blocks, from the first, that an earlier process of the same run has finished.
        pruned: Number of pruned weights of each finished layer, by full name. The masks are in each block's
            `BlockResult`; a mask is never inferred from zeros.
        updated: Names of the finished blocks' layers and other parameters of which more than zeros changed.
        origin: Where masks that were given come from, for the report.
        details: What was measured of each finished layer, by full name.
        activations: Peak bytes of stored hidden states, by place (device, host, disk).
        allocation: With an allocator, how many of its pattern's steps each layer is pruned by, once that is known.
        search: What an allocator that searches says of its search.
        threshold: Threshold over the scores of the whole model, for scope "model", once it is known.
        gradient_cache: Number of gradient statistics read from the cache, and bytes added to it.
        recovered: What the report says of the recovery of the whole model, once that is done.
        report: The report, once the run is finished.
    """

    recipe: PruneRecipe
    metric: Metric
    pattern: Pattern
    folder: Path | None = None
    allocator: Allocator | None = None
    refiners: tuple[Refiner, ...] = ()
    recovery: Recovery | None = None
    objective: Objective | None = None
    wants_details: bool = False
    blocks: list[Block] = field(default_factory=list)
    excluded: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plugins: dict[str, dict[str, str]] = field(default_factory=dict)
    observers: list[Observer] = field(default_factory=list)
    profile: Profile = field(default_factory=Profile)
    output: Output = field(default_factory=Output)
    finished: int = 0
    pruned: dict[str, int] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    origin: dict[str, Any] | None = None
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    gradient_cache: dict[str, int] = field(default_factory=dict)
    allocation: dict[str, int] | None = None
    search: dict[str, Any] = field(default_factory=dict)
    threshold: Threshold | None = None
    recovered: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None

    def anew(self, batch_size: int) -> Run:
        """Return what was asked for with another batch size, and nothing of it done."""
        return Run(
            self.recipe.model_copy(update={"batch_size": batch_size}),
            self.metric,
            self.pattern,
            self.folder,
            self.allocator,
            self.refiners,
            self.recovery,
            self.objective,
            self.wants_details,
            observers=self.observers,
            origin=self.origin,
        )

    @property
    def propagate(self) -> Propagate:
        """Whether calibration sees the earlier blocks pruned or dense."""
        return self.recipe.propagate

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.recipe.seed

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """The statistics that the metric, the refiners and the recovery require, each once."""
        of_parts = [self.metric.requires, *(refiner.requires for refiner in self.refiners)]
        if self.recovery is not None:
            of_parts.append(self.recovery.requires)
        return tuple(dict.fromkeys(required for requires in of_parts for required in requires))

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the further calibration data that anything requires, each once."""
        return streams_of((*self.requires, *needed_to_allocate(self)))

    @property
    def parts(self) -> list[Configurable]:
        """All plugins that make the method."""
        others = (self.allocator, *self.refiners, self.recovery, self.objective)
        return [self.metric, *(part for part in others if part is not None)]

    @property
    def uses_data(self) -> bool:
        """Whether calibration data have a say in the result or in what is measured of it."""
        targets = self.recovery.targets if self.recovery is not None else None
        return bool(
            self.requires
            or self.wants_details
            or targets
            or recovers_models(self.recovery)
            or (self.allocator is not None and self.allocator.requires)
        )

    def pattern_for(self, layer: Layer) -> Pattern:
        """Return the pattern of one layer: the run's, with the layer's own share if there is an allocation."""
        if self.allocation is None:
            return self.pattern
        return self.pattern.at(self.allocation[layer.name], layer.shape)

    @property
    def scope(self) -> Scope | None:
        """The comparison group of an unstructured pattern."""
        return self.pattern.scope if isinstance(self.pattern, Unstructured) else None


def required_statistics(runs: Iterable[Run]) -> tuple[Requirement, ...]:
    """Return the statistics to collect for the runs: those that any of them requires or measures by, each once."""
    measuring = [MEASURES_ERROR] if any(run.wants_details for run in runs) else []
    return tuple(dict.fromkeys([*(kind for run in runs for kind in run.requires), *measuring]))


def needed_to_allocate(run: Run) -> tuple[Requirement, ...]:
    """Return the statistics of the dense model that a run's allocator measures by; none without one."""
    if run.allocator is None:
        return ()
    return (*run.allocator.requires, *(run.metric.requires if run.allocator.uses_scores else ()))
