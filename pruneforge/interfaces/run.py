"""What a run is, for the loop that works on it and the plugins that observe it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.patterns import Pattern, Scope, Unstructured
from pruneforge.interfaces.selection import Threshold
from pruneforge.profile import Profile

Propagate = Literal["pruned", "dense"]


@dataclass
class Run:
    """One pruning run: one pattern.

    Attributes:
        metric: The metric, with its options.
        pattern: The pattern asked for.
        propagate: Whether calibration sees the earlier blocks pruned or dense.
        blocks: The model's blocks in the order they run.
        seed: Seed of every random choice.
        excluded: Layers of the blocks that the user left out; they stay dense.
        warnings: What a user has to know, one line each.
        profile: Where the time goes; runs that share forward passes share it.
        finished: How many blocks, from the first, an earlier process of the same run has finished.
        pruned: For each finished layer, by full name, how many of its weights are pruned. Its mask is in the
            `BlockResult` of its block; the engine owns it, and nothing infers a mask from zeros.
        activations: Most bytes of hidden states that waited at a time, by place (device, host, disk).
        threshold: Of the scores of the whole model, once it is known; for scope "model" alone.
        gradient_cache: How many gradient statistics were found there, and how many bytes were added.
    """

    metric: Metric
    pattern: Pattern
    propagate: Propagate
    blocks: list[Block]
    seed: int = 0
    excluded: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    profile: Profile = field(default_factory=Profile)
    finished: int = 0
    pruned: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    gradient_cache: dict[str, int] = field(default_factory=dict)
    threshold: Threshold | None = None

    @property
    def scope(self) -> Scope | None:
        """The comparison group of an unstructured pattern."""
        return self.pattern.scope if isinstance(self.pattern, Unstructured) else None


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
