"""Tiny random language models of the shapes that the adapter takes, for checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruneforge import Example

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},  # biases in its projections too
    "phi3": {},  # fused projections
}
"""What differs from the default configuration of each kind of model."""


def examples() -> list[Example]:
    """Return the models, each with a tokenizer of bytes and two batches, one of them padded on the right."""
    import transformers

    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    found = []
    for kind, changes in MODELS.items():
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZE, **changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = transformers.AutoModelForCausalLM.from_config(config).eval()
        found.append(Example(kind, module, tokenizer, _batches(len(tokenizer))))
    return found


def _batches(vocabulary: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, vocabulary, (5, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[4, 11:] = 0
    return [{"input_ids": ids[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]
