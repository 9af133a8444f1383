"""The interface of recoveries, which change the remaining weights of a pruned block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn, optim

from pruneforge.interfaces import options
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import LayerStatistics, Requirement

Targets = Literal["dense", "pruned"]
"""Which outputs of the dense block a pruned block is compared with: those in the dense model, or those on the inputs
that the pruned blocks before it give."""


class Passing(ABC):
    """One batch at a block that is being recovered.

    Attributes:
        batch: The batch; `batch.valid` says what is padding.
        target: The dense block's output [samples, ..., hidden].
    """

    batch: Batch
    target: Tensor

    @abstractmethod
    def output(self) -> Tensor:
        """Run the block as it is now, and return its output [samples, ..., hidden], differentiable."""


class Site(ABC):
    """A pruned block and what a recovery may know of it.

    Weights, inputs and targets are float32, or float64 in a float64 model; afterwards weights are rounded to the
    model's dtype. Masks are kept by the engine: pruned weights are zero after each `step`, and at the end.

    Attributes:
        block: The block.
        layers: Its layers that this process recovers if each is recovered for itself; with one process, all of them.
            The other processes receive the result.
        stats: The statistics that `requires` names, by layer name.
        masks: Boolean [out, in] by layer name, on the device; `True` keeps.
        dense: The weights before pruning [out, in], by layer name.
        batch_count: Number of batches that `batches` yields; 0 without targets.
    """

    block: Block
    layers: Sequence[Layer]
    stats: Mapping[str, LayerStatistics]
    masks: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    batch_count: int

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return what may be changed: the block's parameters, but for the weights of layers that stay dense."""

    @abstractmethod
    def bias(self, layer: Layer) -> nn.Parameter | None:
        """Return the bias [out] that is added to a layer's output, or `None` if it has none."""

    @abstractmethod
    def batches(self, shuffle: bool = False) -> Iterator[Passing]:
        """Yield every batch once, with `shuffle` in another order each time, the same for the run's seed.

        Processes see all batches in the same order, and each has to use every one.
        """

    @abstractmethod
    def step(self, optimizer: optim.Optimizer, loss: Tensor) -> None:
        """Take one step of an optimizer of `parameters()` down a loss, without moving pruned weights."""


class Recovery(options.Configurable, ABC):
    """Changes the remaining weights of each block once it is pruned, within its masks.

    A closed form solves for each of `site.layers`. Training makes an optimizer of `site.parameters()` and calls
    `site.step` for each of `site.batches()`.

    Attributes:
        requires: The statistics it needs, which join those of the metric.
        targets: With what a block's output is compared, which keeps inputs and targets for `site.batches()`; `None` if
            statistics are all it needs. A property if it depends on the options.
    """

    requires: Sequence[Requirement] = ()
    targets: Targets | None = None

    class Options(options.Options):
        """Options of every recovery."""

    @abstractmethod
    def recover_block(self, site: Site) -> None:
        """Change the weights and biases of a pruned block in place.

        Torch's random numbers are seeded before each call.

        Args:
            site: The block.
        """
