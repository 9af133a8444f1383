"""The interface of recoveries, which change the remaining weights of a pruned block or of the whole pruned model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor, nn, optim

from pruneforge.interfaces import options
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import LayerStatistics, Requirement
from pruneforge.progress import Progress

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
    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Run the block with other weights within the context, such as functions of parameters of one's own.

        `Passing.output` is then differentiable in what they were made of. The block's own are untouched: at the end,
        write what was learned with `layer.write`.

        Args:
            weights: Weights [out, in] by layer name, for any of the block's layers; pruned ones are to be zero.
        """

    @abstractmethod
    def step(self, optimizer: optim.Optimizer, loss: Tensor) -> None:
        """Take one step of an optimizer down a loss, without moving pruned weights.

        It may be of `parameters()`, or of others that the loss depends on, as with `substituted`.
        """


class ModelSite(ABC):
    """A pruned model and what a recovery may know of it.

    Nothing in the model is changed in place. A recovery holds what it trains itself, in float32 or better, and makes
    parameters of it: `losses` runs the model with them in place of its own, and `write` writes them in the end. In both
    the engine rounds them to the model's dtype and applies the masks, so that what is trained is what is written,
    pruned weights stay zero, and layers that the user excluded stay dense.

    Attributes:
        module: The pruned model on the device, in evaluation mode; none of its parameters requires gradients.
        layers: Its pruned layers.
        masks: Boolean [out, in] by layer name, on the device; `True` keeps.
        head: The layer outside of the blocks that makes the logits, or `None` if the adapter does not say which it is.
        batch_count: Number of batches of calibration data.
        progress: Shows progress: go through the steps by its `track`.
    """

    module: nn.Module
    layers: Sequence[Layer]
    masks: Mapping[str, Tensor]
    head: Layer | None
    batch_count: int
    progress: Progress

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what may be replaced, by full name: all parameters but the weights of layers that stay dense.

        One that the model uses in several places has its first name; it is replaced in all of them.
        """

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches on the device without end, each pass over the data in another order.

        The order is the same for the run's seed.

        Args:
            start: How many to leave out, which an earlier process has used.
        """

    @abstractmethod
    def losses(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's loss [samples], differentiable: that of the run's objective, or the adapter's.

        Args:
            batch: The batch.
            parameters: Tensors in place of parameters, by full name, of the same shapes.

        Raises:
            PruneForgeError: A name is not one of `parameters()`, or a shape differs.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of what it depends on, until the next `step`.

        Raises:
            PruneForgeError: The loss is not finite.
        """

    @abstractmethod
    def step(self, optimizer: optim.Optimizer) -> None:
        """Take one step of an optimizer down the gradients of all `backward` since the last one.

        Raises:
            PruneForgeError: A gradient is not finite.
        """

    @abstractmethod
    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Write new values of parameters into the model, by full name, once training is done.

        Raises:
            PruneForgeError: As `losses` does, or a value is too large for the model's dtype.
        """

    @abstractmethod
    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save what the recovery needs to go on from here, where the run can be resumed; small, as it is written often.

        Torch's random numbers are saved with it.

        Args:
            state: Tensors, numbers and texts in dictionaries and lists.
        """

    @abstractmethod
    def restored(self) -> dict[str, Any] | None:
        """Return what `checkpoint` saved last, in an earlier process, and go on with its random numbers; or `None`."""

    @abstractmethod
    def report(self, **facts: Any) -> None:
        """Add facts to the report, of types that JSON holds; each name is one entry, and none of the engine's.

        Raises:
            PruneForgeError: Reports have an entry of that name for every recovery.
        """

    @abstractmethod
    def warn(self, text: str) -> None:
        """Add a warning for the user, one line; what is left out has to be said."""


class Recovery(options.Configurable, ABC):
    """Changes the remaining weights of a pruned model within its masks: of each block, of the whole, or of both.

    A recovery overrides `recover_block`, `recover_model` or both. In `recover_block` a closed form solves for each of
    `site.layers`; training makes an optimizer of `site.parameters()` and calls `site.step` for each of
    `site.batches()`. In `recover_model` training steps down the losses of the whole model.

    Attributes:
        requires: The statistics that `recover_block` needs, which join those of the metric.
        targets: With what a block's output is compared, which keeps inputs and targets for `site.batches()` of
            `recover_block`; `None` if statistics are all it needs. A property if it depends on the options.
    """

    requires: Sequence[Requirement] = ()
    targets: Targets | None = None

    class Options(options.Options):
        """Options of every recovery."""

    def recover_block(self, site: Site) -> None:
        """Change the weights and biases of a pruned block in place.

        Torch's random numbers are seeded before each call.

        Args:
            site: The block.
        """

    def recover_model(self, site: ModelSite) -> None:
        """Change parameters of the pruned model, once all blocks are pruned.

        The model is held in memory whole, in one process. Torch's random numbers are seeded before.

        Args:
            site: The model.
        """


def recovers_blocks(recovery: Recovery | None) -> bool:
    """Return whether there is a recovery that changes blocks."""
    return recovery is not None and type(recovery).recover_block is not Recovery.recover_block


def recovers_models(recovery: Recovery | None) -> bool:
    """Return whether there is a recovery that changes the whole model."""
    return recovery is not None and type(recovery).recover_model is not Recovery.recover_model
