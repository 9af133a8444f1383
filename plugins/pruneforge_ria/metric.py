"""RIA (Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models, 2024)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import NM, ColumnSquares, Layer, LayerStatistics, Metric, Pattern, Pruned, PruneForgeError


class RIA(Metric):
    """`S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a`, compared within each layer (equation 4).

    For N:M, columns may be permuted so that more of the score is kept: important columns come into different groups
    (`snake`), and then one column of each group is exchanged at a time so that the groups keep the most, by linear
    assignment (`assignment`). The mask is selected in that order, and mapped back to the layer's own. `snake` may keep
    less than no permutation does, `assignment` never less than `snake`. The authors' faster way, which
    splits the columns, is not here.
    """

    requires = (ColumnSquares,)
    scope = "layer"

    class Options(Metric.Options):
        """Options of RIA."""

        a: float = Field(0.5, ge=0, description="exponent of the input's norm")
        permutation: Literal["none", "snake", "assignment"] = Field(
            "none", description="how columns are permuted for N:M; assignment needs the extra permutation"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.permutation == "assignment":
            _assignment()

    @property
    def permutes(self) -> bool:  # type: ignore[override]
        """Whether the option `permutation` asks for one."""
        return self.options.permutation != "none"

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return relative importance [out, in] times norm [in]; a row or column of zeros counts as unimportant."""
        weight = layer.weight.abs()
        relative = weight / weight.sum(0).clamp_min(1e-30) + weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
        return relative * stats[ColumnSquares].per_sample().pow(self.options.a / 2)

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Return the mask [out, in], and the order of columns in which it fits N:M if one is asked for."""
        if not self.permutes:
            return super().prune_layer(layer, stats, pattern)
        assert isinstance(pattern, NM)  # no other is asked of a metric that permutes
        score = self.checked_score(layer, stats)
        order = snake(score, pattern)
        if self.options.permutation == "assignment":
            order = assigned(score, order, pattern)
        mask = torch.empty(layer.shape, dtype=torch.bool, device=score.device)
        mask[:, order] = pattern.select(score[:, order])
        return Pruned(mask, permutation=order)


def snake(score: Tensor, pattern: NM) -> Tensor:
    """Return columns [in] dealt to groups of M.

    They are sorted by the sum of their scores [out, in] and cut into M runs; run t fills place t of every group, and
    every other run is dealt backwards.
    """
    runs = score.sum(0).argsort(stable=True).view(pattern.m, -1)
    runs[1::2] = runs[1::2].flip(1)
    return runs.T.reshape(-1)


def assigned(score: Tensor, order: Tensor, pattern: NM) -> Tensor:
    """Return the order [in] after the columns of each place were assigned anew to the groups, so that these keep most.

    With the other columns of group g fixed, a column x adds `sum_i max(x_i - t_i, 0)` to what g keeps of the scores
    [out, in], where t is the N-th largest of the others. That is half of `sum_i |x_i - t_i|`, plus terms of x or t
    alone, which every assignment has.
    """
    groups, most = order.view(-1, pattern.m), _kept(score, order, pattern)
    for place in range(pattern.m if pattern.n < pattern.m else 0):
        columns = score.T[groups]  # [groups, M, out]
        others = torch.cat([columns[:, :place], columns[:, place + 1 :]], 1)
        least = others.topk(pattern.n, dim=1).values[:, -1]
        distance = torch.cdist(least[None], columns[None, :, place], p=1)[0]
        _, taken = _assignment()(distance.cpu().numpy(), maximize=True)
        moved = groups.clone()
        moved[:, place] = groups[torch.from_numpy(taken).to(groups.device), place]
        kept = _kept(score, moved.view(-1), pattern)
        if kept > most:  # rounded sums may call equal what is a little less
            groups, most = moved, kept
    return groups.reshape(-1)


def _kept(score: Tensor, order: Tensor, pattern: NM) -> float:
    """Return the sum of the scores [out, in] that a mask keeps in some order of columns."""
    groups = score[:, order].view(len(score), -1, pattern.m)
    return float(groups.topk(pattern.n).values.sum(dtype=torch.float64))


def _assignment() -> Any:
    """Return scipy's linear assignment.

    Raises:
        PruneForgeError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise PruneForgeError(
            "option permutation=assignment of ria needs scipy, which is not installed; install the extra 'permutation' "
            "of pruneforge-lab (in a clone: pip install '.[permutation]'), or choose permutation=snake"
        ) from None
    return linear_sum_assignment
