"""One batch of data, as an architecture's adapter prepared it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    """

    inputs: dict[str, Tensor]
    size: int
    valid: Tensor | None = None
    targets: Tensor | None = None
    loss: str = ""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        move: Callable[[Tensor | None], Tensor | None] = lambda t: None if t is None else t.to(device)  # noqa: E731
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        return replace(self, inputs=inputs, valid=move(self.valid), targets=move(self.targets))
