"""What is run on a device that is simulated and on one that is real: a small model, patterns, scopes and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tokens
from safetensors.torch import load_file

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]


def small(**changes):
    """Two blocks, with layers of more columns than SparseGPT takes together."""
    return tiny_llama(**{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 136, **changes})


def padded(side: str) -> dict[str, torch.Tensor]:
    ids, pad = tokens(), torch.full((6, 5), 7)
    parts = [(pad, pad * 0), (ids, ids * 0 + 1)]
    parts = parts if side == "left" else parts[::-1]
    return {"input_ids": torch.cat([p[0] for p in parts], 1), "attention_mask": torch.cat([p[1] for p in parts], 1)}


CASES = [
    {},
    {"pattern": "2:4"},
    {"propagate": "dense"},
    {"options": {"scope": "layer"}},
    {"options": {"scope": "block"}},
    {"options": {"scope": "model"}, "propagate": "dense"},
    {"calibration": "right"},
    {"calibration": "left", "pattern": "4:8"},
]


def settings_of(case: dict, metric: str) -> dict:
    if metric == "sparsegpt" and "options" in case:
        pytest.skip("chooses its own comparison groups")
    data = case.get("calibration")
    return {**case, "calibration": tokens().split(3) if data is None else [padded(data)]}


def assert_same_output(found: Path, expected: Path) -> None:
    """Masks to the bit; updated weights to the rounding of attention, which the device computes another way."""
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())
    assert (found / "pruneforge.masks").read_bytes() == (expected / "pruneforge.masks").read_bytes()
    for path in expected.glob("model*.safetensors"):
        torch.testing.assert_close(load_file(found / path.name), load_file(path), rtol=1e-9, atol=1e-12)
