"""Batches of token ids, and losses of tokens, for the adapters of text models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pruneforge import PruneForgeError
from pruneforge_transformers.gguf_files import source

PART = 1 << 24
"""Number of logits that are converted to float32 at a time."""


def token_inputs(
    data: Tensor | Mapping[str, Tensor], vocabulary: int, context: int | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return a batch's tensors by name, with `input_ids` as int64 [samples, tokens], and which tokens are no padding.

    Args:
        data: Token ids, or a mapping with `input_ids` and maybe `attention_mask` and others.
        vocabulary: Number of tokens that the model knows.
        context: Most tokens that a sample may have, if there is such a limit.

    Raises:
        PruneForgeError: The tensors do not fit each other or the model.
    """
    inputs = {"input_ids": data} if isinstance(data, Tensor) else dict(data) if isinstance(data, Mapping) else {}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(data).__name__
        raise PruneForgeError(f"a batch must hold token ids, int64 [samples, tokens], maybe with a mask; got {got}")
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise PruneForgeError(f"{name} of a batch must be a tensor; got {type(value).__name__}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise PruneForgeError(
            f"a batch holds token id {ids.max().item() if ids.min() >= 0 else ids.min().item()}, "
            f"and the model knows 0 to {vocabulary - 1}; was another tokenizer used?"
        )
    if context and ids.shape[1] > context:
        raise PruneForgeError(f"a batch is {ids.shape[1]} tokens long, and the model's context is {context}")
    inputs["input_ids"] = ids.long()
    return inputs, _valid(inputs.get("attention_mask"), ids)


def _valid(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Return which tokens are not padding, boolean [samples, tokens], or `None` if there is no padding.

    Raises:
        PruneForgeError: The mask does not fit the ids, or a sample is all padding.
    """
    if mask is None or bool(mask.bool().all()):
        return None
    if mask.shape != ids.shape:
        raise PruneForgeError(f"attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}")
    if not mask.bool().any(dim=1).all():
        raise PruneForgeError("a batch holds a sample that is all padding; leave it out")
    return mask.bool()


def mean_losses(logits: Tensor, targets: Tensor, counted: Tensor | None) -> Tensor:
    """Return each sample's mean cross-entropy over its tokens [samples], in float32 or better.

    Args:
        logits: [samples, tokens, vocabulary].
        targets: int64 [samples, tokens].
        counted: Which tokens the mean is over, boolean [samples, tokens]; `None` for all.
    """
    losses = _token_losses(logits.flatten(0, 1), targets.flatten()).view(targets.shape)
    if counted is None:
        return losses.mean(dim=1)
    # `where`, not a product: losses at padding may be NaN.
    return torch.where(counted, losses, 0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each token's cross-entropy [tokens] of `logits` [tokens, vocabulary], in float32 or better.

    Computed for a few tokens at a time, and again in the backward pass: float32 logits, their softmax and its gradient
    would take six times the memory of bfloat16 logits.
    """
    step = max(1, PART // logits.shape[-1])
    parts = list(zip(logits.split(step), targets.split(step), strict=True))
    if len(parts) == 1:
        return _cross_entropy(*parts[0])
    return torch.cat([checkpoint(_cross_entropy, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def tokenizer_of(reference: str) -> Any:
    """Return the tokenizer, or `None` if none can be loaded; batches of token ids do not need it."""
    import transformers

    try:
        with source(reference) as arguments:
            return transformers.AutoTokenizer.from_pretrained(**arguments, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None  # a text source raises an error later that says what is missing
    except Exception as error:  # what its library raises of a damaged one
        reason = " ".join(str(error).split())[:200]
        raise PruneForgeError(f"the tokenizer of {reference!r} is damaged: {reason}") from error
