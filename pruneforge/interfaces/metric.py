"""The interface of a pruning metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces import options
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.patterns import Pattern, Scope
from pruneforge.interfaces.statistics import LayerStatistics, Statistic
from pruneforge.numerics import accumulation_dtype


@dataclass(frozen=True)
class Pruned:
    """What a metric decided for one layer.

    Attributes:
        mask: Boolean [out, in], `True` keeps.
        weight: The weight [out, in] of a method that updates it; `None` leaves it as it was.
        notes: What a user has to know, such as a damping that had to be raised; goes to the report.
    """

    mask: Tensor
    weight: Tensor | None = None
    notes: tuple[str, ...] = ()


class Metric(options.Configurable):
    """Turns a layer and its statistics into a score, or into a pruned layer.

    Most metrics override `score` and nothing else. A method that also changes weights overrides
    `prune_layer` instead, and sets `scope = None` if it chooses its own comparison groups.

    Attributes:
        requires: The statistics it needs; a property where that depends on the options.
        scope: The comparison group its paper uses.
    """

    requires: Sequence[type[Statistic]] = ()
    scope: ClassVar[Scope | None] = "row"

    class Options(options.Options):
        """Options of every metric that scores."""

        scope: Scope | None = Field(None, description="comparison group; by default the one of the metric's paper")

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return one number a weight [out, in], higher is more important.

        May be called several times for a layer, and must return the same each time; random numbers from
        torch are seeded for each layer, so drawing them is no exception.

        Args:
            layer: The layer; `layer.weight` is [out, in], float32 or float64, read only.
            stats: The statistics that `requires` names.
        """
        raise NotImplementedError(f"metric {self.name!r} implements neither score nor prune_layer")

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Return the layer's mask: score, then select.

        Args:
            layer: The layer, dense.
            stats: The statistics that `requires` names; read only, other patterns of the same run use them too.
            pattern: Selects a mask from scores with `pattern.select`.
        """
        return Pruned(pattern.select(self.checked_score(layer, stats)))

    def checked_score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return `score` on the layer's device, in float32 or float64 and contiguous, checked.

        Raises:
            PruneForgeError: The score has another shape than the weight, or NaN, which compares with nothing.
        """
        score = self.score(layer, stats)
        if score.shape != layer.shape:
            raise PruneForgeError(
                f"metric {self.name!r} scored layer {layer.name!r} with shape {tuple(score.shape)}, "
                f"its weight has {layer.shape}"
            )
        if score.numel() and torch.aminmax(score).min.isnan():
            raise PruneForgeError(f"metric {self.name!r} scored layer {layer.name!r} with NaN")
        dtype = accumulation_dtype(score.dtype)
        return score.to(layer.parameter.device, dtype).contiguous()

    def comparison_group(self) -> Scope | None:
        """Return the scope asked for, or the metric's own."""
        return getattr(self.options, "scope", None) or self.scope
