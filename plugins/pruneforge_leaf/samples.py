"""Instructions with their responses, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """An instruction and the response to it.

    Attributes:
        instruction: Token ids, int64 [tokens], of one token or more.
        response: Token ids, int64 [tokens], of one token or more.

    Raises:
        ValueError: One of them is empty.
    """

    instruction: Tensor
    response: Tensor

    def __post_init__(self) -> None:
        for name in ("instruction", "response"):
            if not len(getattr(self, name)):
                raise ValueError(f"the {name} of a sample has no token")

    def with_response(self, tokens: int) -> Sample:
        """Return the sample with the first tokens of the response as part of the instruction.

        Of these, tokens are then flagged as well: what the paper calls response level.

        Raises:
            ValueError: Nothing would be left of the response.
        """
        instruction = torch.cat([self.instruction, self.response[:tokens]])
        return Sample(instruction, self.response[tokens:])


@dataclass(frozen=True)
class Padded:
    """Samples in one batch, with padding to the right.

    Attributes:
        ids: Token ids, int64 [samples, tokens].
        mask: Where tokens are, int64 [samples, tokens].
        response: Where tokens of responses are, bool [samples, tokens].
    """

    ids: Tensor
    mask: Tensor
    response: Tensor


def padded(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Padded:
    """Return samples as a batch. Token 0 stands for padding, which is masked."""
    rows = [torch.cat([sample.instruction, sample.response]) for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    places = torch.arange(ids.shape[1], device=device)
    ends = torch.tensor([len(row) for row in rows], device=device)[:, None]
    starts = torch.tensor([len(sample.instruction) for sample in samples], device=device)[:, None]
    return Padded(ids, (places < ends).long(), (places >= starts) & (places < ends))
