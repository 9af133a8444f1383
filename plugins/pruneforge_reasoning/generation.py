"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruneforge import PruneForgeError, Subject

TOGETHER = 16
"""Questions answered together unless another number is asked for; where memory is full, fewer are tried."""


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
        text: The text, without special tokens.
        tokens: How many tokens it wrote, the one that ends it among them.
        ended: Whether it came to an end of its own.
    """

    text: str
    tokens: int
    ended: bool


def generate(subject: Subject, prompts: Sequence[Tensor], longest: int) -> list[Written]:
    """Let a model go on after each prompt with the likeliest token, until it ends or has written `longest` tokens.

    Args:
        subject: The model, with its tokenizer.
        prompts: Token ids of each prompt, int64 [tokens].
        longest: Tokens to write at most.

    Returns:
        What was written after each prompt.

    Raises:
        PruneForgeError: The model or its tokenizer names no token that ends a text.
    """
    model, tokenizer = subject.model.module, subject.model.processor
    config = _greedy(model, tokenizer, longest)
    own = model.generation_config
    try:
        # `generate` fills in what a config does not set from the model's own, which may draw, penalise or forbid.
        model.generation_config = type(own)()
        return _written(subject, prompts, config)
    finally:
        model.generation_config = own


def _written(subject: Subject, prompts: Sequence[Tensor], config: Any) -> list[Written]:
    model, tokenizer = subject.model.module, subject.model.processor
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))  # alike lengths need little padding
    size = subject.batch_size_or(TOGETHER)
    found: dict[int, Written] = {}
    for some in subject.progress.track([order[i : i + size] for i in range(0, len(order), size)], "answering"):
        ids, mask = _padded([prompts[place] for place in some], config.pad_token_id)
        written = model.generate(
            input_ids=ids.to(subject.device), attention_mask=mask.to(subject.device), generation_config=config
        )
        for place, row in zip(some, written[:, ids.shape[1] :].tolist(), strict=True):
            found[place] = _ended(row, config.eos_token_id, tokenizer)
    return [found[place] for place in range(len(prompts))]


def _greedy(model: Any, tokenizer: Any, longest: int) -> Any:
    """Return a config that takes the likeliest token, and ends at the tokenizer's end and those of the model."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    named = [tokenizer.eos_token_id, *(own if isinstance(own, Sequence) else [own])]
    known = model.get_input_embeddings().weight.shape[0]
    ends = [token for token in named if token is not None and token < known]
    if not ends:
        raise PruneForgeError(
            f"neither {type(model).__name__} nor its tokenizer names a token that ends an answer; set `eos_token_id` "
            "in generation_config.json"
        )
    return GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=ends, pad_token_id=ends[0])


def _padded(prompts: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Return prompts with padding to the left, int64 [prompts, tokens], and where they are, of the same shape."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _ended(row: Sequence[int], ends: Sequence[int], tokenizer: Any) -> Written:
    """Return what was written, up to the first token that ends it; what follows is padding."""
    length = next((place + 1 for place, token in enumerate(row) if token in ends), None)
    tokens = row[:length]
    return Written(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), length is not None)
