"""Estimate how many passages two texts share, from a sketch small enough for a report.

A passage is 32 consecutive tokens. The sketch of a text keeps the smallest hashes of its passages, so the choice
depends on content alone: a passage in two texts is chosen in both or in neither (bottom-k sketch; Broder, 1997).
"""

from __future__ import annotations

import base64

import numpy as np
from torch import Tensor

PASSAGE = 32
"""Number of tokens in a passage."""

KEPT = 256
"""Number of hashes in a sketch."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def sketch(sequences: list[Tensor]) -> str:
    """Return the sketch of token sequences, int64 [tokens] each, as base64 text."""
    hashes = [_passages(sequence) for sequence in sequences]
    smallest = np.unique(np.concatenate(hashes))[:KEPT] if hashes else np.empty(0, np.uint64)
    return base64.b64encode(smallest.astype("<u8").tobytes()).decode()


def shared(sketched: str, sequence: Tensor) -> float:
    """Estimate the share of a sketched text's passages that also occur in `sequence`, int64 [tokens]."""
    kept = np.frombuffer(base64.b64decode(sketched), dtype="<u8")
    return float(np.isin(kept, _passages(sequence)).mean()) if len(kept) else 0.0


def _passages(sequence: Tensor) -> np.ndarray:
    """Return a hash of each passage, uint64 [tokens - PASSAGE + 1]."""
    tokens = sequence.flatten().cpu().numpy().astype(np.uint64)
    count = len(tokens) - PASSAGE + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    value = np.zeros(count, np.uint64)
    for offset in range(PASSAGE):  # polynomial hash modulo 2^64, all windows at once
        value = value * _MULTIPLIER + tokens[offset : offset + count] + np.uint64(1)
    value ^= value >> np.uint64(31)  # the low bits of a product mix poorly
    value *= np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(29))
