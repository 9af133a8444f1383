"""Statistics: streaming summaries of the inputs, outputs and gradients of layers.

A statistic holds raw sums and counts; each metric does its own normalisation. Sums are float32, or float64 in a float64
model, and merge by addition across batches and processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeGuard, TypeVar

import torch
from torch import Tensor

from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.options import Configurable
from pruneforge.numerics import accumulation_dtype

S = TypeVar("S", bound="Statistic")
T = TypeVar("T")

_FRAMEWORK = ("pruneforge.", "abc", "builtins", "typing")

VALUES_IN_CACHE = 1 << 18
"""Number of input values that fit in the processor's cache together with the intermediate results."""


class Statistic(ABC):
    """A sum over the calibration data, for one layer.

    Attributes:
        total: The raw sum.
        samples: Number of samples (sequences or images) in it.
        tokens: Number of tokens in it.
        parameters: What `of` has set.
    """

    total: Tensor
    samples: int = 0
    tokens: int = 0
    parameters: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def of(cls: type[S], **parameters: Any) -> type[S]:
        """Return this statistic with other values of its class attributes, such as `Histogram.of(bins=32)`.

        Equal values give the same class, so `stats[Histogram.of(bins=32)]` finds what `requires` names. They are part
        of what identifies cached sums.

        Args:
            parameters: Values that can be hashed, of attributes that the class has.

        Raises:
            PruneForgeError: The class has no such attribute.
        """
        origin: type[S] = cls.__mro__[1] if "parameters" in vars(cls) else cls
        own = {name for base in origin.__mro__ if not base.__module__.startswith(_FRAMEWORK) for name in vars(base)}
        known = sorted(name for name in own if not name.startswith("_") and not callable(getattr(origin, name)))
        for name, value in parameters.items():
            if name not in known:
                raise unknown_name(f"parameter of {origin.__name__}", name, known)
            if not isinstance(value, Hashable):
                raise PruneForgeError(f"parameter {name}={value!r} of {origin.__name__} cannot be hashed; use a tuple")
        merged = {**cls.parameters, **parameters}
        changed = tuple(sorted((name, value) for name, value in merged.items() if value != getattr(origin, name)))
        return _with_parameters(origin, changed) if changed else origin

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
        by_sample: Whether `update`, and so `add` without `in_cache`, receives one sample at a time, for sums of what is
            not linear in tokens. No routed layer has it: experts receive the tokens of all samples mixed.
    """

    in_cache: ClassVar[bool] = False
    by_sample: ClassVar[bool] = False

    def update(self, inputs: Tensor, samples: int) -> None:
        """Add one batch.

        Args:
            inputs: [tokens, in], without padding, in the model's dtype.
            samples: Number of samples that the tokens come from.
        """
        together = VALUES_IN_CACHE // max(1, inputs.shape[-1]) if self.in_cache and inputs.device.type == "cpu" else 0
        for part in inputs.split(together) if together else [inputs]:
            self.add(part.to(self.total.dtype))
            self.tokens += len(part)
        self.samples += samples

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in], in the dtype of the sums, to `total`; may be called several times for a batch."""


class OutputStatistic(Statistic):
    """A sum over the tokens that a layer put out, dense, before anything else is done with them.

    Attributes:
        by_sample: Whether `add` receives one sample at a time; see `InputStatistic`.
    """

    by_sample: ClassVar[bool] = False

    def update(self, outputs: Tensor, samples: int) -> None:
        """Add one batch.

        Args:
            outputs: [tokens, out], without padding, in the model's dtype.
            samples: Number of samples that the tokens come from.
        """
        self.add(outputs.to(self.total.dtype))
        self.samples += samples
        self.tokens += outputs.shape[0]

    @abstractmethod
    def add(self, outputs: Tensor) -> None:
        """Add `outputs` [tokens, out], in the dtype of the sums, to `total`."""


class GradientStatistic(Statistic):
    """A sum over samples of a function of each sample's own weight gradient, in the dense model.

    The gradient is that of the sample's mean loss, as the run's objective or else the adapter says.

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
        """Add the gradient [out, in] of one sample's loss, in the dtype of the sums, to `total`.

        The tensor is reused for the next sample and must not be changed or kept.
        """


class BlockGradientStatistic(GradientStatistic):
    """A sum over samples of a function of the gradient of a loss on the block's own output.

    It is collected while the block is calibrated: the block is dense, its inputs are those of the other statistics, and
    nothing passes the rest of the model. A subclass says what is summed by inheriting from another gradient statistic::

        class Regional(BlockGradientStatistic, GradientSquares):
            @staticmethod
            def loss(output, batch, target):
                return output.flatten(1).norm(dim=1)

    Attributes:
        with_target: Whether `loss` compares with the block's output in the dense model, where earlier blocks are dense
            too. With `propagate="dense"` the two are the same.
    """

    with_target: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def loss(output: Tensor, batch: Batch, target: Tensor | None) -> Tensor:
        """Return the loss of each sample [samples], differentiable.

        Args:
            output: The block's output [samples, ..., hidden], padding included.
            batch: The batch; `batch.valid` says what is padding.
            target: The block's output in the dense model, if `with_target`.
        """


@cache
def _with_parameters(cls: type[Any], parameters: tuple[tuple[str, Any], ...]) -> Any:
    values = dict(parameters)
    suffix = f"({', '.join(f'{name}={value!r}' for name, value in parameters)})"
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__ + suffix, "__doc__": cls.__doc__}
    return type(cls.__name__ + suffix, (cls,), {**names, **values, "parameters": values})


@dataclass(frozen=True)
class On(Generic[S]):
    """A statistic of one of several named sets of calibration data: `On("general", GradientSquares)`.

    Where data are not named, or a name is left out, a statistic is of the first set.

    Attributes:
        stream: Name of the data.
        kind: The statistic.
    """

    stream: str
    kind: type[S]

    @property
    def __name__(self) -> str:
        """What messages call it."""
        return f"{self.kind.__name__} on {self.stream!r}"


Requirement = type[Statistic] | On[Any]
"""What `requires` may name."""


def of_model_gradients(kind: type[Statistic]) -> TypeGuard[type[GradientStatistic]]:
    """Return whether a statistic sums gradients of the model's loss, and not of a loss on the block's own output."""
    return issubclass(kind, GradientStatistic) and not issubclass(kind, BlockGradientStatistic)


def kind_of(required: Requirement) -> type[Statistic]:
    """Return the statistic that is required, of whatever data."""
    return required.kind if isinstance(required, On) else required


def streams_of(requires: Iterable[Requirement]) -> tuple[str, ...]:
    """Return the names of the further calibration data that are required, each once."""
    return tuple(dict.fromkeys(required.stream for required in requires if isinstance(required, On)))


K = TypeVar("K", bound=Statistic)


def empty_statistics(layer: Layer, kinds: Iterable[type[K]], device: torch.device | None = None) -> dict[type[K], K]:
    """Return empty statistics of a layer, by class, with their sums on `device`, by default the layer's."""
    weight = layer.parameter
    return {kind: kind(layer.shape, accumulation_dtype(weight.dtype), device or weight.device) for kind in kinds}


class LayerStatistics:
    """The statistics of one layer, by what `requires` names: `stats[ColumnSquares].total`."""

    def __init__(
        self, statistics: Mapping[Requirement, Statistic], shared: dict[Any, Any], owner: object = None
    ) -> None:
        self._statistics = dict(statistics)
        self._shared = shared
        self._owner = owner

    def __getitem__(self, required: type[S] | On[S]) -> S:
        """Return a statistic.

        Raises:
            KeyError: It is not in `requires`.
        """
        try:
            return self._statistics[required]  # type: ignore[return-value]
        except KeyError:
            raise KeyError(f"{required.__name__} is not among what `requires` names") from None

    def items(self) -> Iterable[tuple[Requirement, Statistic]]:
        """Return the statistics with what names them."""
        return self._statistics.items()

    @property
    def input_key(self) -> int:
        """A number that is equal for layers with the same input."""
        return id(self._shared)

    def joined(self, others: Mapping[Any, Statistic]) -> LayerStatistics:
        """Return these statistics together with others of the same layer."""
        return LayerStatistics({**self._statistics, **others}, self._shared, self._owner)

    def owned_by(self, part: Configurable) -> LayerStatistics:
        """Return these statistics for one part of a method, whose shared values are apart from those of others.

        The same class with the same options shares them, at several patterns. A method that is built on another hands
        it `stats.owned_by(other)`.
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
