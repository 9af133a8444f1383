"""The interface of pruning metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from pydantic import Field
from torch import Tensor

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces import options
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.patterns import Pattern, Scope
from pruneforge.interfaces.statistics import LayerStatistics, Requirement
from pruneforge.numerics import accumulation_dtype


@dataclass(frozen=True)
class Pruned:
    """The result of a metric for one layer.

    Attributes:
        mask: Boolean [out, in], `True` keeps.
        weight: The updated weight [out, in], or `None` to leave it unchanged.
        notes: Messages for the report, such as about a damping that had to be raised.
        permutation: Order of the columns, int64 [in], in which the mask fits the pattern; `None` for the layer's own.
            Mask and weight are in the layer's own order in any case. Only a metric that `permutes` gives one.
    """

    mask: Tensor
    weight: Tensor | None = None
    notes: tuple[str, ...] = ()
    permutation: Tensor | None = None

    def fits(self, pattern: Pattern) -> bool:
        """Return whether the mask, with its columns permuted if there is a permutation, fits a pattern."""
        return pattern.fits(self.mask if self.permutation is None else self.mask[:, self.permutation])


class Metric(options.Configurable):
    """Turns a layer and its statistics into a score, or into a pruned layer.

    Most metrics override `score` and nothing else. A method that also changes weights overrides `prune_layer` instead,
    or `prune_block` if it decides over a block's layers together, and sets `scope = None` if it chooses its own
    comparison groups.

    Attributes:
        requires: The statistics it needs; a property if they depend on the options.
        scope: The comparison group that its paper uses.
        control: Whether studies show it beside any method, as what a method has to beat.
        permutes: Whether each result has a permutation of the columns, in which its mask fits N:M; a property if it
            depends on the options.
    """

    requires: Sequence[Requirement] = ()
    permutes: bool = False
    scope: ClassVar[Scope | None] = "row"
    control: ClassVar[bool] = False

    class Options(options.Options):
        """Options of every metric that scores."""

        scope: Scope | None = Field(None, description="comparison group; by default the one of the metric's paper")

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return one number for each weight [out, in]; higher is more important.

        May be called several times for a layer, and must return the same each time. Random numbers from torch may be
        used: they are seeded before each call.

        Args:
            layer: The layer; `layer.weight` is [out, in], float32 or float64, read only.
            stats: The statistics that `requires` names.
        """
        raise NotImplementedError(f"metric {self.name!r} implements neither score nor prune_layer")

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Prune one layer; by default, score its weights and select a mask.

        Args:
            layer: The layer, dense.
            stats: The statistics that `requires` names; read only, since other patterns of the same run use them too.
            pattern: Selects a mask from scores with `pattern.select`.
        """
        return Pruned(pattern.select(self.checked_score(layer, stats)))

    def prune_block(
        self, layers: Sequence[Layer], stats: Mapping[str, LayerStatistics], patterns: Mapping[str, Pattern]
    ) -> dict[str, Pruned]:
        """Prune the layers of a block together; by default, each for itself by `prune_layer`.

        Override this where what one layer loses depends on another layer of the block.

        Args:
            layers: The block's layers, dense.
            stats: Their statistics, by layer name; read only.
            patterns: The pattern of each layer, by name; they differ where an allocator gives each its own sparsity.

        Returns:
            The result of each layer, by name.
        """
        return {la.name: self.prune_layer(la, stats[la.name], patterns[la.name]) for la in layers}

    def measure(self, layer: Layer, score: Tensor, stats: LayerStatistics) -> Mapping[str, float]:
        """Return finite numbers about a layer's score, by name, for the report; by default none.

        They stand beside the layer in the report, as `measured`, whatever the comparison group. Only metrics that score
        are asked, before the layer is pruned.

        Args:
            layer: The layer, dense.
            score: What `score` returned for it [out, in].
            stats: The statistics that `requires` names; read only.
        """
        return {}

    def remarks(self, measured: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
        """Return lines for the user and the report's warnings about what `measure` returned; by default none.

        Called once at the end of a run that has measured anything.

        Args:
            measured: By layer name, of all pruned layers that have any.
        """
        return ()

    def checked_score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return `score` checked and contiguous, in float32 or float64, on the layer's device.

        Raises:
            PruneForgeError: The score differs from the weight in shape, or contains NaN, which cannot be compared.
        """
        score = self.score(layer, stats)
        if not isinstance(score, Tensor) or score.is_complex() or score.dtype == torch.bool:
            what = str(score.dtype) if isinstance(score, Tensor) else type(score).__name__
            raise PruneForgeError(
                f"metric {self.name!r} scored layer {layer.name!r} with {what}; it must return a tensor of real numbers"
            )
        if score.shape != layer.shape:
            raise PruneForgeError(
                f"metric {self.name!r} scored layer {layer.name!r} with shape {tuple(score.shape)}, "
                f"but its weight has {layer.shape}"
            )
        if score.numel() and torch.aminmax(score).min.isnan():
            raise PruneForgeError(f"metric {self.name!r} scored layer {layer.name!r} with NaN")
        dtype = accumulation_dtype(score.dtype)
        return score.to(layer.parameter.device, dtype).contiguous()

    def comparison_group(self) -> Scope | None:
        """Return the scope option, or else the metric's own scope.

        Raises:
            PruneForgeError: The metric's own is not a scope.
        """
        scope = getattr(self.options, "scope", None) or self.scope
        if scope is not None and scope not in get_args(Scope):
            raise PruneForgeError(
                f"metric {self.name!r} has the scope {scope!r}; it must be None or one of {', '.join(get_args(Scope))}"
            )
        return scope


def scores_layers(metric: Metric) -> bool:
    """Return whether a metric gives each weight a score."""
    return type(metric).score is not Metric.score


def measures_scores(metric: Metric) -> bool:
    """Return whether a metric has numbers to report about its scores."""
    return scores_layers(metric) and type(metric).measure is not Metric.measure


def prunes_blocks(metric: Metric) -> bool:
    """Return whether a metric decides over a block's layers together."""
    return type(metric).prune_block is not Metric.prune_block
