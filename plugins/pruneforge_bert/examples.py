"""Tiny random encoders of the shapes that the adapter takes, for checks."""

from __future__ import annotations

from typing import Any

from pruneforge import Example
from pruneforge_transformers.examples import text_examples

MODELS: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 48, "architectures": ["BertForMaskedLM"]},
    "distilbert": {"hidden_dim": 48, "architectures": ["DistilBertForMaskedLM"]},
}
"""Settings of each kind of model."""


def examples() -> list[Example]:
    """Return the models, with a head that predicts masked tokens."""
    return text_examples("AutoModelForMaskedLM", MODELS)
