"""Which tokens a student attends to and its teacher does not, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruneforge_leaf.samples import Sample, padded

SHARE = 0.05
"""Quantile of the gaps up to which tokens are flagged: the published 5 % for mathematics; code has 10 %."""

HIGHEST = 0.5
"""No token is flagged whose difference, scaled to 0 to 1, is above this."""


def gradient_norms(embedding: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Return how much a loss depends on each token.

    Args:
        embedding: The module that embeds tokens or patches; its output is [samples, tokens, hidden].
        loss: Runs the model, and returns a loss summed over samples, scalar.

    Returns:
        L2 norms of the gradient with respect to the embedding of each token [samples, tokens], in float32 or better.

    Raises:
        RuntimeError: The loss does not go through `embedding`.
    """
    seen: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = embedding.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            value = loss()
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(f"the loss does not go through {type(embedding).__name__}")
    # Of the embeddings alone: the parameters' gradients are neither computed nor touched.
    (gradient,) = torch.autograd.grad(value, seen[-1])
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).norm(dim=-1)


def sensitivities(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """Return how much the loss on each response depends on each token of its instruction.

    Args:
        model: A language model of transformers, in evaluation mode.
        samples: Instructions with their responses.

    Returns:
        A tensor [tokens] for each sample, on the CPU: norms of gradients, as `gradient_norms` has them, of the mean
        loss a token of the response.
    """
    device = next(model.parameters()).device
    batch = padded(samples, device)

    def loss() -> Tensor:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
        response = batch.response[:, 1:]
        return ((losses * response).sum(1) / response.sum(1)).sum()

    norms = gradient_norms(model.get_input_embeddings(), loss).cpu()
    return [row[: len(sample.instruction)] for row, sample in zip(norms, samples, strict=True)]


def gap(teacher: Tensor, student: Tensor) -> Tensor:
    """Return how much more a teacher depends on each token than a student does, scaled to 0 to 1.

    Each one's norms [tokens] are scaled to 0 to 1 over the tokens first, and their difference once more.
    """
    return _scaled(_scaled(teacher) - _scaled(student))


def confounding(teacher: Tensor, student: Tensor, share: float = SHARE, candidates: Tensor | None = None) -> Tensor:
    """Return which tokens distract the student: those whose gap is lowest.

    Args:
        teacher: The teacher's sensitivities [tokens].
        student: The student's [tokens].
        share: Quantile of the gaps up to which tokens are flagged, unless they are above `HIGHEST`. The lowest one is
            flagged in any case.
        candidates: The tokens that are compared and may be flagged, bool [tokens]; by default all.

    Returns:
        bool [tokens]. Where all gaps are the same, none distracts more than another, and none is flagged.
    """
    flags = torch.zeros(len(teacher), dtype=torch.bool, device=teacher.device)
    compared = torch.ones_like(flags) if candidates is None else candidates.to(flags.device)
    if compared.any():
        gaps = gap(teacher[compared], student[compared])
        quantile = gaps.sort().values[min(int(share * len(gaps)), len(gaps) - 1)]  # as in the authors' script
        flags[compared] = (gaps <= quantile) & (gaps <= HIGHEST) & (gaps.min() < gaps.max())
    return flags


def words(tokenizer: Any, ids: Tensor) -> Tensor:
    """Return which tokens are neither white space nor special, bool [tokens]."""
    special = set(tokenizer.all_special_ids)
    found = [token not in special and bool(tokenizer.decode([token]).strip()) for token in ids.tolist()]
    return torch.tensor(found, dtype=torch.bool)


def _scaled(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
