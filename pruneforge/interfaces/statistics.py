"""Streaming summaries of what a layer saw.

A statistic holds raw sums and counts; each metric does its own normalisation. Sums are float32, or
float64 in a float64 model, and merge by addition, so that batches, processes and runs can be joined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pruneforge.interfaces.layer import Layer
from pruneforge.numerics import accumulation_dtype, products_of

S = TypeVar("S", bound="Statistic")
T = TypeVar("T")

CACHED = 1 << 18
"""Values of an input that a processor's cache holds beside what is made of them."""


class Statistic(ABC):
    """A sum over what the calibration data showed to a layer.

    Attributes:
        total: The raw sum.
        samples: How many samples (sequences or images) went into it.
        tokens: How many tokens went into it.
    """

    total: Tensor
    samples: int = 0
    tokens: int = 0

    @abstractmethod
    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Start at zero for a layer of `shape` (out, in), with sums of `dtype` on `device`."""

    def merge(self, other: Statistic) -> None:
        """Add what `other`, of the same class, saw elsewhere."""
        self.total += other.total.to(self.total.device)
        self.samples += other.samples
        self.tokens += other.tokens

    def to(self, device: torch.device) -> None:
        """Move the sums to `device`."""
        self.total = self.total.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything `load_state_dict` needs to restore the statistic."""
        return {"total": self.total, "samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.total, self.samples, self.tokens = state["total"], state["samples"], state["tokens"]


class InputStatistic(Statistic):
    """A sum over the tokens that a layer received; layers that share an input share it.

    Attributes:
        in_cache: Whether tokens are to be given to `add` a few at a time, while they are in the processor's cache:
            faster for a pass over them, slower for a product of them.
    """

    in_cache: ClassVar[bool] = False

    def update(self, inputs: Tensor, samples: int) -> None:
        """Add one batch.

        Args:
            inputs: [tokens, in], padding left out, in the model's dtype.
            samples: How many samples the tokens come from.
        """
        together = CACHED // max(1, inputs.shape[-1]) if self.in_cache and inputs.device.type == "cpu" else 0
        for part in inputs.split(together) if together else [inputs]:
            self.add(part.to(self.total.dtype))
        self.samples += samples
        self.tokens += inputs.shape[0]

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in], in the dtype of the sums, to `total`."""


class GradientStatistic(Statistic):
    """A sum over samples of each sample's own weight gradient, in the dense model.

    Attributes:
        by_rows: Whether `add` treats each row of the gradient by itself, and may be given a few of them at a time.
    """

    by_rows: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=dtype, device=device)

    def part(self, rows: slice) -> GradientStatistic:
        """Return the statistic of some rows, which adds to these sums; all rows are the statistic itself."""
        if rows.stop - rows.start == len(self.total):
            return self
        part = copy(self)
        part.total = self.total[rows]
        return part

    @abstractmethod
    def add(self, gradient: Tensor) -> None:
        """Add the gradient [out, in] of one sample's mean loss, in the dtype of the sums, to `total`.

        The tensor is used again for the next sample, and must not be changed or kept.
        """


class ColumnSquares(InputStatistic):
    """Sum over tokens of each input column's square, `total` [in]."""

    in_cache = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add the squares of `inputs` [tokens, in]."""
        self.total += inputs.square().sum(0)

    def per_sample(self) -> Tensor:
        """Return the sum divided by the number of samples [in]."""
        return self.total / self.samples


class Gram(InputStatistic):
    """Gram matrix of the inputs, X^T X over all tokens, `total` [in, in].

    Of the symmetric matrix only a little more than the lower half is summed up; the rest is filled in when `total` is
    asked for.
    """

    _sum: Tensor
    _half: bool
    _source: torch.dtype | None = None

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], shape[1], dtype=dtype, device=device)

    @property
    def total(self) -> Tensor:
        """The matrix [in, in]."""
        if self._half:
            for part in self._columns():
                self._sum[part, part.stop :] = self._sum[part.stop :, part].T
            self._half = False
        return self._sum

    @total.setter
    def total(self, value: Tensor) -> None:
        self._sum = value
        self._half = False

    def update(self, inputs: Tensor, samples: int) -> None:
        """Add one batch; see `InputStatistic.update`."""
        self._source = inputs.dtype
        super().update(inputs, samples)

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in] transposed times itself."""
        with products_of(self._source or inputs.dtype, inputs.device):
            for part in self._columns():
                self._sum[part.start :, part].addmm_(inputs[:, part.start :].T, inputs[:, part])
        self._half = True

    def _columns(self) -> list[slice]:
        """Return parts of the columns, few and wide enough for fast products."""
        size = len(self._sum)
        step = max(256, -(-size // 4))
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def per_sample(self) -> Tensor:
        """Return the sum divided by the number of samples [in, in]."""
        return self.total / self.samples


class GradientMagnitude(GradientStatistic):
    """Sum over samples of the gradient's absolute value, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the absolute values."""
        self.total += gradient.abs()


class GradientSquares(GradientStatistic):
    """Sum over samples of the gradient's square, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the squares."""
        self.total.addcmul_(gradient, gradient)


class GradientSum(GradientStatistic):
    """Sum over samples of the gradient with its sign, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the gradient as it is."""
        self.total += gradient


K = TypeVar("K", bound=Statistic)


def empty_statistics(layer: Layer, kinds: Iterable[type[K]], device: torch.device | None = None) -> dict[type[K], K]:
    """Return empty statistics of a layer, by class, with their sums on its device or on `device`."""
    weight = layer.parameter
    return {kind: kind(layer.shape, accumulation_dtype(weight.dtype), device or weight.device) for kind in kinds}


class LayerStatistics:
    """The statistics that one layer's metric asked for, by class: `stats[ColumnSquares].total`."""

    def __init__(self, statistics: Mapping[type[Statistic], Statistic], shared: dict[Any, Any]) -> None:
        self._statistics = dict(statistics)
        self._shared = shared

    def __getitem__(self, kind: type[S]) -> S:
        """Return the statistic of class `kind`.

        Raises:
            KeyError: The metric does not name `kind` in its `requires`.
        """
        try:
            return self._statistics[kind]  # type: ignore[return-value]
        except KeyError:
            raise KeyError(f"{kind.__name__} is not among the metric's `requires`") from None

    @property
    def input_key(self) -> int:
        """A number that layers with the same input have in common."""
        return id(self._shared)

    def joined(self, others: Mapping[Any, Statistic]) -> LayerStatistics:
        """Return these statistics with others of the same layer."""
        return LayerStatistics({**self._statistics, **others}, self._shared)

    def shared(self, key: Any, compute: Callable[[], T]) -> T:
        """Return `compute()`, computed once for all the layers that share this layer's input.

        Args:
            key: Names the value among those of this input.
            compute: Derives the value from input statistics alone: no random numbers, nothing of the pattern.
        """
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]
