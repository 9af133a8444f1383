"""The bare matrix products of a run, in a process of its own: what the machine takes for them and nothing else.

    python benchmarks/floor.py

Products of the shapes of `benchmarks/workload.py`, 1024 tokens at a time: those of the blocks' weights and of
attention, twice, for the two forward passes of a calibrated run, and the Gram products of SparseGPT's inputs. Prints
seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from workload import SAMPLES, SHAPE, TOKENS

TOGETHER = 1024
HIDDEN, INNER, HEADS, BLOCKS = (
    SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
)


def timed(products: list[tuple[Tensor, Tensor]], passes: int, kind: str) -> float:
    """Return the seconds of so many rounds over some products."""
    start = time.perf_counter()
    for _ in range(passes):
        for left, right in products:
            if kind == "linear":
                F.linear(left, right)
            elif kind == "gram":
                torch.mm(left.T, left)
            else:
                torch.bmm(left, right)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    passes = SAMPLES * TOKENS // TOGETHER * BLOCKS
    narrow, wide = torch.randn(TOGETHER, HIDDEN), torch.randn(TOGETHER, INNER)
    square, up, down = torch.randn(HIDDEN, HIDDEN), torch.randn(INNER, HIDDEN), torch.randn(HIDDEN, INNER)
    linear = [(narrow, square)] * 4 + [(narrow, up)] * 2 + [(wide, down)]
    samples, size = TOGETHER // TOKENS, HIDDEN // HEADS
    query, key = torch.randn(samples * HEADS, TOKENS, size), torch.randn(samples * HEADS, size, TOKENS)
    weights, value = torch.randn(samples * HEADS, TOKENS, TOKENS), torch.randn(samples * HEADS, TOKENS, size)
    attention = [(query, key), (weights, value)]
    gram = [(narrow, narrow)] * 3 + [(wide, wide)]
    for products, kind in ((linear, "linear"), (attention, "bmm"), (gram, "gram")):
        timed(products, 2, kind)  # warm
    print(
        json.dumps(
            {
                "weights": 2 * timed(linear, passes, "linear"),
                "attention": 2 * timed(attention, passes, "bmm"),
                "gram": timed(gram, passes, "gram"),
            }
        )
    )


if __name__ == "__main__":
    main()
