"""A key-value cache for transformers that prunes tokens as they leave a recent window."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pruneforge import PruneForgeError
from pruneforge_mustafar import bitmap
from pruneforge_mustafar.attention import Inputs, attention, plain
from pruneforge_mustafar.rules import QUERIES, Pruning, query_sums


class PrunedLayer(DynamicLayer):
    """Keys and values of one layer [samples, heads, tokens, channels], of which the earlier tokens are pruned.

    When tokens are added, those are pruned first that the first of them no longer sees in its window. So a prompt that
    is added whole is seen as it is, and pruned once the next token comes, as in the authors' code.
    """

    def __init__(self, keys: Pruning, values: Pruning, window: int) -> None:
        """Hold nothing yet; see `PrunedCache`."""
        super().__init__()
        self.pruning = {"keys": keys, "values": values}
        self.window = window
        self.done = {"keys": 0, "values": 0}
        self.queries: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prune what leaves the window, add tokens, and return all keys and values."""
        for name in self.pruning if self.get_seq_length() else ():
            self._prune(name, self.get_seq_length() + 1 - self.window)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated

    def _prune(self, name: str, leaving: int) -> None:
        pruning, states = self.pruning[name], getattr(self, name)
        done, stop = self.done[name], leaving // pruning.group * pruning.group
        if stop <= done:
            return
        queries = None
        if pruning.rule == "output":
            if self.queries is None:
                raise PruneForgeError("the rule 'output' looks at queries; run the model within cache.watching(model)")
            queries = self.queries.sum(2, keepdim=True)
        parts = [states[:, :, :done], pruning.prune(states[:, :, done:stop], queries), states[:, :, stop:]]
        setattr(self, name, torch.cat(parts, 2))
        self.done[name] = stop

    def see(self, query: Tensor) -> None:
        """Keep the latest queries [samples, query heads, tokens, channels], for the rule `output`."""
        assert self.keys is not None
        sums = query_sums(query[:, :, -QUERIES:], self.keys.shape[1])
        earlier = [] if self.queries is None else [self.queries]
        self.queries = torch.cat([*earlier, sums], 2)[:, :, -QUERIES:]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens; those that were pruned stay so."""
        super().crop(tokens_to_remove)
        self.done = {name: min(done, self.get_seq_length()) for name, done in self.done.items()}

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.done, self.queries = dict.fromkeys(self.done, 0), None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the samples in another order, as beam search does."""
        super().reorder_cache(beam_idx)
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the samples."""
        super().batch_select_indices(indices)
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        self.queries = None if self.queries is None else self.queries.repeat_interleave(repeats, 0)

    def _choose(self, samples: Tensor) -> None:
        self.queries = None if self.queries is None else self.queries[samples.to(self.queries.device)]


class PrunedCache(Cache):
    """A cache for `generate(past_key_values=...)` and `forward` of any transformers model with plain attention.

    Pruned entries are zero; to hold fewer bytes takes kernels for the bitmap format, whose size `nbytes` counts.
    Mustafar (Joo et al., 2025): per token and head, keys after their rotation, the latest 32 tokens dense.
    """

    def __init__(self, keys: Pruning, values: Pruning, window: int = 32) -> None:
        """Hold nothing yet.

        Args:
            keys: How keys are pruned.
            values: How values are pruned; the rule `output` is for keys.
            window: The latest tokens, which stay as they are; the token that is computed is one of them.

        Raises:
            PruneForgeError: The window holds no token, or values have the rule `output`.
        """
        check(keys, values, window)
        make: Any = functools.partial(PrunedLayer, keys, values, window)
        super().__init__(layer_class_to_replicate=make)

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Let the cache see a model's queries within the context, which the rule `output` needs.

        Args:
            model: The model that the cache is for.
        """
        layers: list[Any] = self.layers

        def attend(inputs: Inputs) -> Tensor:
            layers[inputs.layer].see(inputs.query)
            return plain(inputs)

        with attention(model, attend):
            yield

    def nbytes(self) -> tuple[int, int]:
        """Return the bytes that the tokens take in the bitmap format, and dense; those in the window are dense in both.

        Tiles hold 64 tokens of a channel for keys, and 64 channels of a token for values; tokens that fill no tile of
        keys yet are counted dense.
        """
        packed = dense = 0
        layers: list[Any] = self.layers
        for layer in layers:
            for name, along in (("keys", 2), ("values", 3)):
                states, done = getattr(layer, name), layer.done[name]
                whole = done // bitmap.TILE * bitmap.TILE if along == 2 else done
                packed += bitmap.compress(states[:, :, :whole], along).nbytes + states[:, :, whole:].nbytes
                dense += states.nbytes
        return packed, dense


def check(keys: Pruning, values: Pruning, window: int) -> None:
    """Raise unless a cache can be pruned so.

    Raises:
        PruneForgeError: Naming what is wrong.
    """
    if window < 1:
        raise PruneForgeError(f"window {window} holds no token; the token that is computed is always seen as it is")
    if values.rule == "output":
        raise PruneForgeError("the rule 'output' is for keys; by a token's output its values are ranked as by 'token'")
    for what, pruning in (("keys", keys), ("values", values)):
        if not 0 <= pruning.sparsity < 1:
            raise PruneForgeError(f"sparsity {pruning.sparsity} of {what} is outside [0, 1)")
