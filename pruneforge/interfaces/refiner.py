"""The interface of refiners, which improve a mask after the metric has made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pruneforge.interfaces import options
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Pruned
from pruneforge.interfaces.patterns import Pattern
from pruneforge.interfaces.statistics import LayerStatistics, Requirement


class Refiner(options.Configurable, ABC):
    """Changes the mask of a layer, or its remaining weights, within the same pattern.

    Attributes:
        requires: The statistics it needs, which join those of the metric.
        masks_only: Whether it improves masks of the layer's own weights alone. Weights that a metric updated belong to
            its mask: such a result then stays as it is, with a note in the report.
    """

    requires: Sequence[Requirement] = ()
    masks_only: bool = False

    class Options(options.Options):
        """Options of every refiner."""

    @abstractmethod
    def refine(self, layer: Layer, stats: LayerStatistics, pruned: Pruned, pattern: Pattern) -> Pruned:
        """Return a result that replaces `pruned`; its notes are added to the metric's.

        Args:
            layer: The layer, dense.
            stats: The statistics of the metric and of all refiners; read only.
            pruned: The result of the metric, or of the refiner before.
            pattern: The layer's pattern, which the new mask has to fit.
        """
