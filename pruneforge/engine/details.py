"""What a run measures of each layer for its report: the error of its output, and how its scores are distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruneforge.engine.guard import metric_score
from pruneforge.engine.stream import BlockStatistics
from pruneforge.engine.structure import structure_of
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.metric import scores_layers
from pruneforge.interfaces.run import MEASURES_ERROR, Run

BINS = 40
"""Bins of a histogram of scores."""


class LayerDetails:
    """The layers of a block that data reached, from before they are pruned until they are recovered."""

    def __init__(self, run: Run, block: Block, stats: BlockStatistics) -> None:
        """Keep the dense weights, and describe the scores.

        Args:
            run: The run, not several at once.
            block: The block, dense.
            stats: Its statistics, by layer name.
        """
        self._stats = stats
        self._layers = [layer for layer in block.layers if stats[layer.name][MEASURES_ERROR].tokens]
        self._dense = {layer.name: layer.weight.clone() for layer in self._layers}
        scored = self._layers if scores_layers(run.metric) else []
        self._scores = {layer.name: described(metric_score(run, layer, stats[layer.name])) for layer in scored}

    def measured(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each layer, by name, of types that JSON holds.

        `error` is `||X (W - W')^T||^2 / ||X W^T||^2`, with the inputs X that calibration saw, and `None` where the
        dense output is zero. `scores` is what `described` returns, or `None` for a metric without scores.
        """
        found = {}
        for layer in self._layers:
            dense, gram = self._dense[layer.name], self._stats[layer.name][MEASURES_ERROR].total
            whole = _squared(dense, gram)
            error = _squared(dense - layer.weight, gram) / whole if whole else None
            found[layer.name] = {"error": error, "scores": self._scores.get(layer.name)}
        return found


def _squared(weight: Tensor, gram: Tensor) -> float:
    """Return the squared norm of the output of `weight` [out, in] on inputs of a Gram matrix [in, in]."""
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))


def described(score: Tensor) -> dict[str, Any] | None:
    """Return how scores [out, in] are distributed; `None` if one is infinite, as of a weight that is always kept.

    Returns:
        `low` and `high`, decimal logarithms of the smallest and the largest positive score; `counts` of positive scores
        in equal bins between them; `others`, the number of scores that are not positive; `rows` and `columns`, the
        shares of the scores' variance that rows and columns explain; `weights`, the number of scores.
    """
    if not bool(score.isfinite().all()):
        return None
    positive = score[score > 0].double().log10()
    low, high = (float(positive.min()), float(positive.max())) if positive.numel() else (0.0, 0.0)
    counts = torch.histc(positive, BINS, low, high) if low < high else torch.tensor([positive.numel()])
    structure = structure_of(score)
    return {
        "low": low,
        "high": high,
        "counts": [int(count) for count in counts],
        "others": score.numel() - positive.numel(),
        "rows": structure.rows,
        "columns": structure.columns,
        "weights": score.numel(),
    }
