"""The work that speed is measured on: a random LLaMA of 29.5 M parameters, 64 samples of 512 tokens, 50 %.

Imports nothing of PruneForge, so that a peer's own environment can use it.
"""

from __future__ import annotations

from pathlib import Path

import torch

SAMPLES, TOKENS = 64, 512
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


def write_model(folder: Path, **changes: int) -> Path:
    """Write the random float32 model to a folder; `changes` of its shape are for cost curves."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, **changes}, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(number): number for number in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(folder)  # a peer insists on one
    return folder


def token_ids(samples: int = SAMPLES, tokens: int = TOKENS) -> torch.Tensor:
    """Return random token ids [samples, tokens], the same in every process."""
    return torch.randint(SHAPE["vocab_size"], (samples, tokens), generator=torch.Generator().manual_seed(1))
