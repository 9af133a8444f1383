"""SparseGPT's updates of the weights under a mask that another method has made."""

from __future__ import annotations

from pruneforge import Gram, Layer, LayerStatistics, Pattern, Pruned, Refiner
from pruneforge_sparsegpt import metric


class SparseGPT(Refiner):
    """Let the weights that are kept make up for those that are pruned, column by column, as the metric does.

    The mask stays as it is. The weights come from the layer's dense ones, also where the metric, or a refiner before,
    has updated them. A column's error goes to all columns on its right, of which some are pruned later, so a layer may
    end up with a higher error than without; it then keeps its weights, and the report says so.

    Source: Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023.
    """

    requires = (Gram,)

    class Options(Refiner.Options, metric.SparseGPT.Options):
        """Options of SparseGPT, the metric."""

    options: Options

    def refine(self, layer: Layer, stats: LayerStatistics, pruned: Pruned, pattern: Pattern) -> Pruned:
        """Return the mask that is given and updated weights, both [out, in].

        Raises:
            PruneForgeError: The Hessian cannot be factorised.
        """
        solver = metric.SparseGPT(**self.options.model_dump())
        found = solver.compensate(layer, stats.owned_by(solver), pruned.mask)
        assert found.weight is not None
        gram, dense = stats[Gram].total, layer.weight
        before = dense - (dense if pruned.weight is None else pruned.weight) * pruned.mask
        after = dense - found.weight
        if ((after @ gram) * after).sum() > ((before @ gram) * before).sum():
            return Pruned(
                pruned.mask, pruned.weight, (*found.notes, "updated weights had a higher error: left as given")
            )
        return found
