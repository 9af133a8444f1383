"""Attention to keys and values of which those outside of a recent window are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from pruneforge import PruneForgeError
from pruneforge_mustafar.rules import QUERIES, Pruning, query_sums

NAME = "pruneforge_mustafar"
"""What transformers calls this attention."""

Attend = Callable[..., Tensor]

_attend: ContextVar[Attend] = ContextVar("attend")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    return _attend.get()(module, query, key, value, mask, **more).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def attention(model: Any, attend: Attend) -> Iterator[None]:
    """Have a transformers model compute its attention by a function within the context.

    Args:
        model: The model.
        attend: Takes what transformers gives to attention functions, and returns outputs
            [samples, heads, tokens, channels].

    Raises:
        PruneForgeError: The model does not let its attention be replaced, or has one of another kind.
    """
    used = False

    def counted(*args: Any, **more: Any) -> Tensor:
        nonlocal used
        used = True
        if more.get("s_aux") is not None:
            raise PruneForgeError(f"the attention of {type(model).__name__} has sinks, which are not supported")
        return attend(*args, **more)

    try:
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
    except (AttributeError, ValueError) as error:
        raise PruneForgeError(f"the attention of {type(model).__name__} cannot be replaced: {error}") from error
    token = _attend.set(counted)
    try:
        yield
    finally:
        _attend.reset(token)
        model.set_attn_implementation(before)
    if not used:  # some old models compute it by themselves, whatever is set
        raise PruneForgeError(f"the attention of {type(model).__name__} cannot be replaced, so its cache is not pruned")


def plain(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Return the outputs of plain attention [samples, heads, tokens, channels]."""
    key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
    return _weights(query @ key.transpose(2, 3), mask, query, scaling, softcap) @ value


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

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the outputs [samples, heads, tokens, channels]."""
        sums = self._sums_at_leaving(query, key) if self.keys.rule == "output" else None
        shares = query.shape[1] // key.shape[1]
        pruned_key = repeat_kv(self._pruned(self.keys, key, sums), shares)
        pruned_value = repeat_kv(self._pruned(self.values, value, None), shares)
        key, value = repeat_kv(key, shares), repeat_kv(value, shares)
        tokens = query.shape[2]
        dense = self._dense(self.keys, tokens, query.device)
        scores = torch.where(dense, query @ key.transpose(2, 3), query @ pruned_key.transpose(2, 3))
        weights = _weights(scores, mask, query, scaling, softcap)
        dense = self._dense(self.values, tokens, query.device)
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


def _weights(
    scores: Tensor, mask: Tensor | None, query: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return the weights of attention, as transformers computes them, from products of queries and keys."""
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask[:, :, :, : scores.shape[-1]]
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
