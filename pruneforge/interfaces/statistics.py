"""Statistics: streaming summaries of the inputs and gradients of layers.

A statistic holds raw sums and counts; each metric does its own normalisation. Sums are float32, or float64 in a float64
model, and merge by addition across batches and processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.options import Configurable
from pruneforge.numerics import accumulation_dtype, products_of

S = TypeVar("S", bound="Statistic")
T = TypeVar("T")

VALUES_IN_CACHE = 1 << 18
"""Number of input values that fit in the processor's cache together with the intermediate results."""


class Statistic(ABC):
    """A sum over the calibration data, for one layer.

    Attributes:
        total: The raw sum.
        samples: Number of samples (sequences or images) in it.
        tokens: Number of tokens in it.
    """

    total: Tensor
    samples: int = 0
    tokens: int = 0

    @abstractmethod
    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Start at zero for a layer of `shape` (out, in), with sums of `dtype` on `device`."""

    def merge(self, other: Statistic) -> None:
        """Add another statistic of the same class, collected on other data."""
        self.total += other.total.to(self.total.device)
        self.samples += other.samples
        self.tokens += other.tokens

    def to(self, device: torch.device) -> None:
        """Move the sums to `device`."""
        self.total = self.total.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to restore the statistic."""
        return {"total": self.total, "samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the statistic from the result of `state_dict`."""
        self.total, self.samples, self.tokens = state["total"], state["samples"], state["tokens"]


class InputStatistic(Statistic):
    """A sum over the tokens that a layer received. Layers that share an input share the statistic.

    Attributes:
        in_cache: Whether `add` receives a few tokens at a time on the CPU, so that they stay in the processor's cache.
            That is faster for elementwise sums and slower for matrix products.
    """

    in_cache: ClassVar[bool] = False

    def update(self, inputs: Tensor, samples: int) -> None:
        """Add one batch.

        Args:
            inputs: [tokens, in], without padding, in the model's dtype.
            samples: Number of samples that the tokens come from.
        """
        together = VALUES_IN_CACHE // max(1, inputs.shape[-1]) if self.in_cache and inputs.device.type == "cpu" else 0
        for part in inputs.split(together) if together else [inputs]:
            self.add(part.to(self.total.dtype))
        self.samples += samples
        self.tokens += inputs.shape[0]

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in], in the dtype of the sums, to `total`; may be called several times for a batch."""


class GradientStatistic(Statistic):
    """A sum over samples of a function of each sample's own weight gradient, in the dense model.

    Attributes:
        by_rows: Whether `add` treats each row of the gradient separately, so that it can receive a few rows at a time.
    """

    by_rows: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=dtype, device=device)

    def part(self, rows: slice) -> GradientStatistic:
        """Return a view of some rows, which adds to the same sums; for all rows, the statistic itself."""
        if rows.stop - rows.start == len(self.total):
            return self
        part = copy(self)
        part.total = self.total[rows]
        return part

    @abstractmethod
    def add(self, gradient: Tensor) -> None:
        """Add the gradient [out, in] of one sample's mean loss, in the dtype of the sums, to `total`.

        The tensor is reused for the next sample and must not be changed or kept.
        """


class ColumnSquares(InputStatistic):
    """Sum over tokens of the squares of each input column, `total` [in]."""

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

    The matrix is symmetric, so only its lower half and a little more are summed. Reading `total` mirrors that half;
    this happens once, after all batches.
    """

    _sum: Tensor
    _half: bool  # whether the upper half of `_sum` is out of date
    _source: torch.dtype | None = None  # dtype of the inputs before `update` converted them; narrow products are exact

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], shape[1], dtype=dtype, device=device)

    @property
    def total(self) -> Tensor:
        """The whole matrix [in, in]."""
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
        """Split the columns into at most four parts, each wide enough for fast products."""
        size = len(self._sum)
        step = max(256, -(-size // 4))
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def per_sample(self) -> Tensor:
        """Return the sum divided by the number of samples [in, in]."""
        return self.total / self.samples


class GradientMagnitude(GradientStatistic):
    """Sum over samples of the absolute value of the gradient, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the absolute values."""
        self.total += gradient.abs()


class GradientSquares(GradientStatistic):
    """Sum over samples of the square of the gradient, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the squares."""
        self.total.addcmul_(gradient, gradient)


class GradientSum(GradientStatistic):
    """Sum over samples of the signed gradient, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the gradient as it is."""
        self.total += gradient


K = TypeVar("K", bound=Statistic)


def empty_statistics(layer: Layer, kinds: Iterable[type[K]], device: torch.device | None = None) -> dict[type[K], K]:
    """Return empty statistics of a layer, by class, with their sums on `device`, by default the layer's."""
    weight = layer.parameter
    return {kind: kind(layer.shape, accumulation_dtype(weight.dtype), device or weight.device) for kind in kinds}


class LayerStatistics:
    """The statistics of one layer that the metric requires, by class: `stats[ColumnSquares].total`."""

    def __init__(
        self, statistics: Mapping[type[Statistic], Statistic], shared: dict[Any, Any], owner: object = None
    ) -> None:
        self._statistics = dict(statistics)
        self._shared = shared
        self._owner = owner

    def __getitem__(self, kind: type[S]) -> S:
        """Return the statistic of class `kind`.

        Raises:
            KeyError: `kind` is not in the metric's `requires`.
        """
        try:
            return self._statistics[kind]  # type: ignore[return-value]
        except KeyError:
            raise KeyError(f"{kind.__name__} is not among the metric's `requires`") from None

    def items(self) -> Iterable[tuple[type[Statistic], Statistic]]:
        """Return the statistics with their classes."""
        return self._statistics.items()

    @property
    def input_key(self) -> int:
        """A number that is equal for layers with the same input."""
        return id(self._shared)

    def joined(self, others: Mapping[Any, Statistic]) -> LayerStatistics:
        """Return these statistics together with others of the same layer."""
        return LayerStatistics({**self._statistics, **others}, self._shared, self._owner)

    def owned_by(self, part: Configurable) -> LayerStatistics:
        """Return these statistics for a metric or refiner, whose shared values are apart from those of others.

        The same class with the same options shares them, at several patterns.
        """
        return LayerStatistics(self._statistics, self._shared, (type(part), repr(part.options)))

    def shared(self, key: Any, compute: Callable[[], T]) -> T:
        """Return `compute()`, called once for all layers that share this layer's input.

        Args:
            key: Identifies the value among those of this input.
            compute: Derives the value from input statistics only, without random numbers and whatever the pattern.
        """
        of_owner = self._shared.setdefault(self._owner, {})
        if key not in of_owner:
            of_owner[key] = compute()
        return of_owner[key]
