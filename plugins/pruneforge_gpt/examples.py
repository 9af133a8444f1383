"""Tiny random language models of the shapes that the adapter takes, for checks."""

from __future__ import annotations

from typing import Any

from pruneforge import Example
from pruneforge_transformers.examples import text_examples

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 48},  # transposed weights
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 48},  # fused projections, attention beside the MLP
}
"""Settings of each kind of model."""


def examples() -> list[Example]:
    """Return the models."""
    return text_examples("AutoModelForCausalLM", MODELS)
