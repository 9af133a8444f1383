"""The interface of objectives: the loss whose gradients statistics sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from pruneforge.interfaces import options
from pruneforge.interfaces.batch import Batch


class Objective(options.Configurable, ABC):
    """A loss of the whole model, in place of the adapter's own, for statistics of the model's gradients.

    Where a loss compares samples with one another, a sample's own gradient is the part of the gradient of the batch's
    summed losses that flows through that sample's tokens. Over the samples of a batch these add up to the whole.

    Attributes:
        whole_batches: Whether the samples of a batch belong together, so that `losses` has to see all of them at once.
            The batches then decide what is compared: their size belongs to the method.
    """

    whole_batches: ClassVar[bool] = False

    class Options(options.Options):
        """Options of every objective."""

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sample's own loss [samples], differentiable.

        Called with a few samples at a time where a model has many logits, unless it takes `whole_batches`.

        Args:
            output: What the adapter's `forward` returned for the batch, in the model's library's own form.
            batch: The batch; `batch.valid` says what is padding, `batch.targets` what the adapter's loss compares with.
        """
