"""D2Prune (Xiong et al., Sparsifying Large Language Models via Dual Taylor Expansion, AAAI 2026), form for Wanda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import ColumnSquares, InputStatistic, Layer, LayerStatistics, Metric, OutputStatistic, Statistic


class InputNorms(InputStatistic):
    """Sum over samples of the norm of each input column over the sample's tokens, `total` [in]."""

    by_sample = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add the norms of a sample's `inputs` [tokens, in]."""
        self.total += inputs.norm(dim=0)


class OutputNorms(OutputStatistic):
    """Sum over samples of the norm of each output over the sample's tokens, bias included, `total` [out]."""

    by_sample = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[0], dtype=dtype, device=device)

    def add(self, outputs: Tensor) -> None:
        """Add the norms of a sample's `outputs` [tokens, out]."""
        self.total += outputs.norm(dim=0)


class D2Prune(Metric):
    """`W_ij^2 s_j + r1 y_i |W_ij| z_j - r2 W_ij^2 z_j^2`, compared within each output row.

    With N samples, s_j is the mean over them of `||X_j||^2`; y_i and z_j are (N + 1) / (2 N) times the sums over them
    of `||Y_i||` and `||X_j||`, divided by `divisor`. Y includes the layer's bias.

    That is the authors' s_j. For y_i and z_j their code multiplies the sum by (n - 1) / n before it adds sample n: in
    the end sample n counts n / N times, so the order of samples decides. Here all count the same, the mean over orders.

    Without r2, a row's order differs from Wanda's only as far as z_j does from the root of s_j: not at all where norms
    do not vary over samples. The paper's form for SparseGPT, which adds these two terms to that method's score and
    updates weights, and its choice of layers that keep theirs are not here; its published numbers are of these.
    """

    scope = "row"

    class Options(Metric.Options):
        """Options of D2Prune."""

        r1: float = Field(1.0, ge=0, description="weight of the term of outputs")
        r2: float = Field(0.0, ge=0, description="weight of the term of inputs alone, which is taken away")
        divisor: float = Field(1500.0, gt=0, description="s: what norms are divided by in both terms")

    options: Options

    @property
    def requires(self) -> Sequence[type[Statistic]]:  # type: ignore[override]
        """Column squares, and norms for the terms that are not 0."""
        options = self.options
        norms = (*([InputNorms] if options.r1 or options.r2 else []), *([OutputNorms] if options.r1 else []))
        return (ColumnSquares, *norms)

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return importance [out, in] from the norms of inputs [in] and outputs [out]."""
        weight = layer.weight.abs()
        score = weight.square() * stats[ColumnSquares].per_sample()
        if self.options.r1:
            score += (
                self.options.r1 * self._norms(stats[OutputNorms])[:, None] * weight * self._norms(stats[InputNorms])
            )
        if self.options.r2:
            score -= self.options.r2 * (weight * self._norms(stats[InputNorms])).square()
        return score

    def _norms(self, sums: Statistic) -> Tensor:
        """Return y [out] or z [in]."""
        return sums.total * ((sums.samples + 1) / (2 * sums.samples * self.options.divisor))
