"""ERK (Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020; after Mocanu et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pruneforge import Allocator, Block, Layer, LayerStatistics, proportional


class ERK(Allocator):
    """Layers keep weights in proportion to the sum of their sides: small layers are denser than large ones.

    The density of a layer [n_out, n_in] is `epsilon (n_in + n_out) / (n_in n_out)`, with the epsilon that gives all
    layers together the run's sparsity. Layers that would be over-full are dense. It looks at shapes alone.
    """

    def measure(
        self, block: Block, stats: Mapping[str, LayerStatistics], score: Callable[[Layer], Tensor]
    ) -> dict[str, Any]:
        """Return the shape of each layer of the block."""
        return {layer.name: layer.shape for layer in block.layers}

    def allocate(
        self, measures: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer."""
        every = {name: size for layers in sizes.values() for name, size in layers.items()}
        sides = {name: sum(shape) for shapes in measures.values() for name, shape in shapes.items()}
        density = proportional({name: sides[name] / size for name, size in every.items()}, every, 1 - sparsity)
        return {name: 1 - share for name, share in density.items()}
