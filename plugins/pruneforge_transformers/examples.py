"""Tiny random text models for checks, made from configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pruneforge import Example

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Settings of all of them; each kind adds its own, such as the width of its MLP."""


def text_examples(auto: str, kinds: Mapping[str, Mapping[str, Any]]) -> list[Example]:
    """Return a model of each kind, with a tokenizer of bytes and two batches, one of them padded on the right.

    Args:
        auto: Name of the transformers class that builds them.
        kinds: By the `model_type` of transformers, settings beside `SIZE`.
    """
    import transformers

    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    found = []
    for kind, settings in kinds.items():
        config = transformers.AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **SIZE, **settings})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = getattr(transformers, auto).from_config(config).eval()
        found.append(Example(kind, module, tokenizer, _batches(len(tokenizer))))
    return found


def _batches(vocabulary: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, vocabulary, (5, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[4, 11:] = 0
    return [{"input_ids": ids[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]
