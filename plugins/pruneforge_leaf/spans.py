"""Samples without the tokens that were flagged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pruneforge_leaf.samples import Sample


def runs(flags: Tensor) -> list[tuple[int, int]]:
    """Return the beginning and end (exclusive) of each run of flagged tokens, of bool [tokens]."""
    edges = torch.diff(flags.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def pruned(sample: Sample, flags: Tensor, how: Literal["span", "collective"] = "span") -> list[Sample]:
    """Return counterfactual samples, whose instructions lack flagged tokens.

    Args:
        sample: The sample.
        flags: Flagged tokens of its instruction, bool [tokens].
        how: `span` leaves out one run of flagged tokens in each of the samples returned, which the paper found to be
            better; `collective` leaves out all in one.
    """
    flags = flags.cpu()
    if how == "span":
        gone = [torch.zeros_like(flags).index_fill(0, torch.arange(start, end), True) for start, end in runs(flags)]
    else:
        gone = [flags] if flags.any() else []
    return [Sample(sample.instruction[~each.to(sample.instruction.device)], sample.response) for each in gone]
