"""Perplexity of a language model whose key-value cache is pruned."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from pruneforge import Subject
from pruneforge_mustafar.attention import OneShot, attention
from pruneforge_mustafar.cache import check
from pruneforge_mustafar.rules import Pruning, Rule
from pruneforge_perplexity.evaluator import Perplexity


class CachePerplexity(Perplexity):
    """Perplexity by the published protocol, with keys and values pruned once they leave a recent window.

    Each token of a window of text sees what its cache would hold if the tokens came one after another. All are computed
    at once; decoding with `PrunedCache` gives the same (Mustafar, Joo et al., 2025, whose prompts are seen dense).
    """

    class Options(Perplexity.Options):
        """Options of the evaluator."""

        keys: float = Field(0.7, ge=0, lt=1, description="share of each key to prune")
        values: float = Field(0.7, ge=0, lt=1, description="share of each value to prune")
        key_rule: Rule = Field("token", description="what is compared: token, output, channel, structured or random")
        value_rule: Rule = Field("token", description="the same for values, but for output")
        recent: int = Field(32, ge=1, description="latest tokens that stay as they are")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return the results of perplexity, and how the cache was pruned."""
        asked = self.options
        keys = Pruning(asked.keys, asked.key_rule, asked.recent)
        values = Pruning(asked.values, asked.value_rule, asked.recent)
        check(keys, values, asked.recent)
        with (
            torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []),
            attention(subject.model.module, OneShot(keys, values, asked.recent)),
        ):
            torch.manual_seed(subject.seed)  # of the rule that is chance
            results = super().evaluate(subject)
        names = ("keys", "key_rule", "values", "value_rule", "recent")
        return {**results, "cache": {name: getattr(asked, name) for name in names}}
