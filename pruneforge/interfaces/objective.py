"""The interface of objectives: the loss whose gradients statistics sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from pruneforge.interfaces import options
from pruneforge.interfaces.batch import Batch


class Objective(options.Configurable, ABC):
    """A loss of the whole model, in place of the adapter's own, for statistics of the model's gradients."""

    class Options(options.Options):
        """Options of every objective."""

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sample's own loss [samples], differentiable.

        Called with a few samples at a time where a model has many logits.

        Args:
            output: What the adapter's `forward` returned for the batch, in the model's library's own form.
            batch: The batch; `batch.valid` says what is padding, `batch.targets` what the adapter's loss compares with.
        """
