"""One batch of data, as an adapter prepares it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes:
        inputs: Arguments of the model, by name; the first dimension of each is samples.
        size: Number of samples (sequences or images).
        valid: Boolean [samples, tokens], `False` for padding, which statistics ignore; `None` if there is none.
        targets: Targets of the loss, in the adapter's own form.
        loss: Description of a sample's loss, for the report.
        tokens: Number of tokens in a sample, including padding; 0 where they are few.
    """

    inputs: dict[str, Tensor]
    size: int
    valid: Tensor | None = None
    targets: Tensor | None = None
    loss: str = ""
    tokens: int = 0

    @cached_property
    def places(self) -> Tensor:
        """Indices of the valid tokens among all tokens of the batch, int64 [valid tokens].

        Cached, since on a device the host has to wait for the result.
        """
        assert self.valid is not None
        return self.valid.flatten().nonzero().flatten()

    @cached_property
    def lengths(self) -> list[int]:
        """Numbers of valid tokens of the samples of a padded batch; cached for the same reason."""
        assert self.valid is not None
        lengths: list[int] = self.valid.sum(1).tolist()
        return lengths

    def part(self, samples: slice) -> Batch:
        """Return a batch of some of the samples."""
        inputs = {key: value[samples] for key, value in self.inputs.items()}
        size = len(range(*samples.indices(self.size)))
        valid = None if self.valid is None else self.valid[samples]
        targets = None if self.targets is None else self.targets[samples]
        return replace(self, inputs=inputs, size=size, valid=valid, targets=targets)

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        valid = None if self.valid is None else self.valid.to(device)
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, inputs=inputs, valid=valid, targets=targets)
