"""Tiny random language models of the shapes that the adapter takes, for checks."""

from __future__ import annotations

from typing import Any

from pruneforge import Example
from pruneforge_transformers.examples import text_examples

SIZE = {"intermediate_size": 48, "num_key_value_heads": 2}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},  # biases in its projections too
    "phi3": {},  # fused projections
}
"""What differs from the default configuration of each kind of model."""


def examples() -> list[Example]:
    """Return the models."""
    return text_examples("AutoModelForCausalLM", {kind: {**SIZE, **changes} for kind, changes in MODELS.items()})
