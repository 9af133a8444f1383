"""Attention to keys and values of which those outside of a recent window are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from pruneforge import PruneForgeError
from pruneforge_mustafar.rules import QUERIES, Pruning, query_sums

NAME = "pruneforge_mustafar"
"""What transformers calls this attention."""


@dataclass(frozen=True)
class Inputs:
    """What an attention function of transformers is given.

    Attributes:
        layer: Number of the layer.
        query: Queries [samples, query heads, tokens, channels].
        key: Keys [samples, heads, seen tokens, channels].
        value: Values, as `key`.
        mask: What is added to the scores [samples, 1, tokens, seen tokens], or `None`.
        scaling: What the products are multiplied by.
        softcap: Where scores are capped, or `None`.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def repeated(self, states: Tensor) -> Tensor:
        """Return keys or values with a head for each query head."""
        return repeat_kv(states, self.query.shape[1] // self.key.shape[1])

    def weights(self, scores: Tensor) -> Tensor:
        """Return the weights of attention, as transformers computes them, from products of queries and keys."""
        scores = scores * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.mask is not None:
            scores = scores + self.mask[:, :, :, : scores.shape[-1]]
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(self.query.dtype)


Attend = Callable[[Inputs], Tensor]

_attend: ContextVar[Attend] = ContextVar("attend")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if s_aux is not None:
        raise PruneForgeError(f"attention with sinks, as {type(module).__name__} has, is not supported")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = Inputs(module.layer_idx, query, key, value, mask, scaling, softcap)
    return _attend.get()(inputs).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def attention(model: Any, attend: Attend) -> Iterator[None]:
    """Have a transformers model compute its attention by a function within the context.

    Args:
        model: The model.
        attend: Returns outputs [samples, query heads, tokens, channels] for the inputs of a layer.

    Raises:
        PruneForgeError: The model does not let its attention be replaced, or has one of another kind.
    """
    used = False

    def noted(inputs: Inputs) -> Tensor:
        nonlocal used
        used = True
        return attend(inputs)

    try:
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
    except (AttributeError, ValueError) as error:
        raise PruneForgeError(f"the attention of {type(model).__name__} cannot be replaced: {error}") from error
    token = _attend.set(noted)
    try:
        yield
    finally:
        _attend.reset(token)
        model.set_attn_implementation(before)
    if not used:  # some old models compute it by themselves, whatever is set
        raise PruneForgeError(f"the attention of {type(model).__name__} cannot be replaced, so its cache is not pruned")


def plain(inputs: Inputs) -> Tensor:
    """Return the outputs of plain attention [samples, query heads, tokens, channels]."""
    key, value = inputs.repeated(inputs.key), inputs.repeated(inputs.value)
    return inputs.weights(inputs.query @ key.transpose(2, 3)) @ value


@dataclass(frozen=True)
class OneShot:
    """Attention of all tokens at once, each to what its cache would hold if they came one after another.

    Attributes:
        keys: How keys are pruned.
        values: How values are pruned.
        window: The latest tokens, which stay as they are; the token itself is one of them.
    """

    keys: Pruning
    values: Pruning
    window: int

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the outputs [samples, query heads, tokens, channels]."""
        query, tokens, device = inputs.query, inputs.query.shape[2], inputs.query.device
        sums = self._sums_at_leaving(query, inputs.key) if self.keys.rule == "output" else None
        pruned_key = inputs.repeated(self._pruned(self.keys, inputs.key, sums))
        pruned_value = inputs.repeated(self._pruned(self.values, inputs.value, None))
        key, value = inputs.repeated(inputs.key), inputs.repeated(inputs.value)
        dense = self._dense(self.keys, tokens, device)
        weights = inputs.weights(torch.where(dense, query @ key.transpose(2, 3), query @ pruned_key.transpose(2, 3)))
        dense = self._dense(self.values, tokens, device)
        return (weights * dense) @ value + (weights * ~dense) @ pruned_value

    def _dense(self, pruning: Pruning, tokens: int, device: torch.device) -> Tensor:
        """Return which tokens each token sees as they were, boolean [tokens, tokens]."""
        places = torch.arange(tokens, device=device)
        ends = (places // pruning.group + 1) * pruning.group - 1  # of the group that each is pruned with
        return places[:, None] - ends[None, :] < self.window

    def _pruned(self, pruning: Pruning, states: Tensor, sums: Tensor | None) -> Tensor:
        """Return all states pruned, but for a last group that is not whole, which no token sees pruned."""
        whole = states.shape[2] // pruning.group * pruning.group
        sums = None if sums is None else sums[:, :, :whole]
        return torch.cat([pruning.prune(states[:, :, :whole], sums), states[:, :, whole:]], 2)

    def _sums_at_leaving(self, query: Tensor, key: Tensor) -> Tensor:
        """Return for each token the sums of the queries before it leaves the window, as `query_sums`."""
        sums = query_sums(query, key.shape[1]).cumsum(2)
        before = torch.nn.functional.pad(sums, (0, 0, 1, 0))  # [..., t] is the sum of the first t queries
        leaves = (torch.arange(key.shape[2], device=key.device) + self.window).clamp(max=key.shape[2])
        return before[:, :, leaves] - before[:, :, (leaves - QUERIES).clamp(min=0)]
