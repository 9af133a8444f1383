"""Small layers with statistics of made-up data, for checks without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import (
    GradientStatistic,
    InputStatistic,
    LayerStatistics,
    OutputStatistic,
    Requirement,
    Statistic,
    empty_statistics,
    kind_of,
)

SAMPLES, TOKENS = 6, 16


@dataclass(frozen=True)
class Sample:
    """A layer, what calibration would have shown to it, and how to collect that.

    Attributes:
        weight: [out, in].
        inputs: [samples, tokens, in].
        gradients: [samples, out, in].
    """

    weight: Tensor
    inputs: Tensor
    gradients: Tensor

    @property
    def outputs(self) -> Tensor:
        """What the layer puts out, [samples, tokens, out]."""
        return self.inputs @ self.weight.T

    def to(self, device: torch.device) -> Sample:
        """Return the sample on a device."""
        return Sample(self.weight.to(device), self.inputs.to(device), self.gradients.to(device))

    def layer(self) -> Layer:
        """Return the layer, with a copy of the weight in the same order in memory."""
        return Layer("layer", nn.Parameter(self.weight.clone(memory_format=torch.preserve_format), requires_grad=False))

    def statistics(self, requires: Sequence[Requirement], parts: int = 1) -> LayerStatistics:
        """Return statistics of the data, collected in `parts` that are then merged; all streams see the same data."""
        merged: dict[type[Statistic], Statistic] = {}
        for part in torch.arange(SAMPLES).chunk(parts):
            collected = empty_statistics(self.layer(), {kind_of(required): None for required in requires})
            for statistic in collected.values():
                self.collect(statistic, part)
            for kind, statistic in collected.items():
                if kind in merged:
                    merged[kind].merge(statistic)
                else:
                    merged[kind] = statistic
        return LayerStatistics({required: merged[kind_of(required)] for required in requires}, {})

    def collect(self, statistic: Statistic, part: Tensor) -> None:
        """Add some samples, by their indices, to a statistic as the engine does."""
        if getattr(statistic, "by_sample", False) and len(part) > 1:
            for one in part.split(1):
                self.collect(statistic, one)
            return
        if isinstance(statistic, InputStatistic):
            statistic.update(self.inputs[part].flatten(0, 1), len(part))
        elif isinstance(statistic, OutputStatistic):
            statistic.update(self.outputs[part].flatten(0, 1), len(part))
        elif isinstance(statistic, GradientStatistic):
            for gradient in self.gradients[part]:
                statistic.add(gradient.to(statistic.total.dtype))
            statistic.samples += len(part)


@contextmanager
def nothing_changed(layer: Layer, stats: LayerStatistics, **others: Tensor) -> Iterator[None]:
    """Assert at the end of the context that a weight, statistics and other tensors hold what they held before."""

    def values() -> dict[str, Tensor]:
        totals = {f"statistic {kind.__name__}": statistic.total for kind, statistic in stats.items()}
        return {"the weight": layer.weight, **totals, **{f"the {name}": tensor for name, tensor in others.items()}}

    before = {name: value.clone() for name, value in values().items()}
    yield
    for name, value in values().items():
        assert torch.equal(value, before[name]), f"{name} is changed in place; work on a copy"


def sample(
    shape: tuple[int, int] = (12, 32), dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> Sample:
    """Return a random layer and correlated inputs with outliers, the same for the same arguments.

    Args:
        shape: (out, in).
        dtype: Dtype of the weight and the inputs.
        seed: Seed of the numbers.
        changes: Other values of the sample's attributes.
    """
    generator = torch.Generator().manual_seed(seed)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mixing = torch.eye(shape[1], dtype=torch.float64) + 0.3 * numbers(shape[1], shape[1])
    inputs = numbers(SAMPLES, TOKENS, shape[1]) @ mixing
    inputs[..., 1] *= 5  # a channel of outliers, as language models have
    values = {"weight": numbers(*shape), "inputs": inputs, "gradients": 0.1 * numbers(SAMPLES, *shape)} | changes
    return Sample(**{name: value.to(dtype) for name, value in values.items()})
