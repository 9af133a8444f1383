"""One batch of data, as an architecture's adapter prepared it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes:
        inputs: What the model is called with, by keyword; the first dimension counts samples.
        size: Number of samples (sequences or images).
        valid: Boolean [samples, tokens], `False` at tokens that count nowhere (padding); `None` if all count.
        targets: What the loss compares with, in the adapter's own form.
        loss: What the loss of a sample is, for the report.
        tokens: How many tokens a sample has, padding included; 0 where they are few.
    """

    inputs: dict[str, Tensor]
    size: int
    valid: Tensor | None = None
    targets: Tensor | None = None
    loss: str = ""
    tokens: int = 0

    @cached_property
    def places(self) -> Tensor:
        """Where the tokens that count stand among all of the batch, int64 [tokens that count].

        Found once for a batch: on a device the host has to wait for it.
        """
        assert self.valid is not None
        return self.valid.flatten().nonzero().flatten()

    def part(self, samples: slice) -> Batch:
        """Return some of the samples as a batch."""
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
