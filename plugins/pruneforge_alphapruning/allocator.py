"""AlphaPruning (Lu et al., AlphaPruning: Using Heavy-Tailed Self Regularization Theory ..., NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Allocator, Block, Layer, LayerStatistics, proportional

STARTS = 256
"""Starts of the power law that are compared together, which bounds their memory."""


class AlphaPruning(Allocator):
    """Blocks whose spectrum has a heavier tail are better trained, and keep more weights.

    With the squared singular values e of a weight, ascending, the power law that starts at e_i has the exponent
    `a_i = 1 + n / (sum_j log e_j - n log e_i)` over its n values from e_i on, and the distance
    `D_i = max_t |1 - (e_t / e_i)^(1 - a_i) - t / n|`, t = 0, ..., n - 1, from them. The weight's alpha is the exponent
    of the least distance among the starts from `0.95 q` to `1.5 q`, where q is the left edge of the fullest of 100 bins
    of `log10 e`. The authors' code compares with `log10(0.95 q)` instead, so that hardly any start is too low: `lower`
    is `code`. Without any in range, it is the last start that larger values follow; with `fit` `mid`, the middle value.

    Alpha of a block is the mean of its weights'. Ratios r rise with it linearly from `1 - eps` to `1 + eps`, and
    sparsities are in proportion to r. The paper's may exceed 1; here those are 1, and the others make up for them.

    It looks at weights alone. Singular values that are zero but for rounding are left out. A weight with fewer than two
    different ones has no alpha, and its ratio is that of the mean alpha.
    """

    class Options(Allocator.Options):
        """Options of AlphaPruning."""

        eps: float = Field(0.2, ge=0, lt=1, description="how far ratios lie from 1; the paper has 0.3 for magnitude")
        fit: Literal["search", "mid"] = Field("search", description="where the power law starts")
        lower: Literal["paper", "code"] = Field("paper", description="lowest start of `search`")
        per: Literal["block", "layer"] = Field("block", description="whose alpha; the paper has layers for images")

    options: Options

    def measure(
        self, block: Block, stats: Mapping[str, LayerStatistics], score: Callable[[Layer], Tensor]
    ) -> dict[str, Any]:
        """Return the alpha of each layer of the block that has one."""
        found = {layer.name: self._alpha(layer.weight) for layer in block.layers}
        return {name: alpha for name, alpha in found.items() if alpha is not None}

    def allocate(
        self, measures: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return the sparsity of each layer."""
        alphas: dict[str, float] = {}
        for block, layers in sizes.items():
            own = measures[block]
            mean = sum(own.values()) / len(own) if own else None
            for name in layers:
                alpha = mean if self.options.per == "block" else own.get(name)
                if alpha is not None:
                    alphas[name] = alpha
        every = {name: size for layers in sizes.values() for name, size in layers.items()}
        low, high = min(alphas.values(), default=0.0), max(alphas.values(), default=0.0)
        middle = sum(alphas.values()) / len(alphas) if alphas else 0.0
        slope = 2 * self.options.eps / (high - low) if high > low else 0.0
        ratios = {name: 1 + slope * (alphas.get(name, middle) - (low + high) / 2) for name in every}
        return proportional(ratios, every, sparsity)

    def _alpha(self, weight: Tensor) -> float | None:
        """Return the exponent of a weight [out, in], or `None` where its singular values give none."""
        values = torch.linalg.svdvals(weight).cpu()  # few numbers, of which sums on a GPU would differ between runs
        values = values[values > 10 * torch.finfo(values.dtype).eps * values.max()]
        spectrum = values.double().square().flip(0)
        logs = spectrum.log()
        counts = torch.arange(len(logs), 0, -1)
        above = logs.flip(0).cumsum(0).flip(0) - counts * logs  # sum of the logs from each start on, less its own
        valid = above > 1e-12 * counts  # starts with larger values behind them
        if not valid.any():
            return None
        starts = self._starts(spectrum, valid)
        exponents = 1 + counts / above
        distances = [_distances(logs, exponents, part) for part in starts.split(STARTS)]
        return float(exponents[starts[int(torch.cat(distances).argmin())]])

    def _starts(self, spectrum: Tensor, valid: Tensor) -> Tensor:
        """Return the indices of the starts to compare, among the valid ones."""
        places = valid.nonzero()[:, 0]
        if self.options.fit == "mid":
            return places[min(len(spectrum) // 2, len(places) - 1)][None]
        counts, edges = torch.histogram(spectrum.log10(), 100)
        peak = 10 ** float(edges[counts.tolist().index(counts.max())])
        low = 0.95 * peak
        if self.options.lower == "code":
            low = math.log10(low)
        inside = places[(spectrum[places] >= low) & (spectrum[places] <= 1.5 * peak)]
        return inside if len(inside) else places[-1:]


def _distances(logs: Tensor, exponents: Tensor, starts: Tensor) -> Tensor:
    """Return D [starts] of power laws at the indices `starts`, given the logs of the spectrum [values]."""
    steps = torch.arange(len(logs)) - starts[:, None]  # t, negative before the start
    share = steps / (len(logs) - starts[:, None])
    law = 1 - ((1 - exponents[starts, None]) * (logs - logs[starts, None])).exp()
    return (law - share).abs_().masked_fill_(steps < 0, 0).amax(1)
