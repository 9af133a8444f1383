"""Perplexity of a causal language model."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from pydantic import Field

from pruneforge import Evaluator, PruneForgeError, Subject, TextSource
from pruneforge.data.evaluation import text_windows

LARGEST_LOSS = math.log(sys.float_info.max)
"""Loss a token whose perplexity is the largest float."""


class Perplexity(Evaluator):
    """exp of the mean loss a token, by the published protocol.

    The documents are joined (by a blank line, unless the source says otherwise) and tokenised as one
    text; consecutive windows are scored each on its own and the tail is dropped. As in the published
    code, a window's loss is the mean over its `window - 1` predicted tokens, and the mean over windows
    is taken. Values for different windows or tokenizers do not compare.
    """

    measure = "perplexity"

    class Options(Evaluator.Options):
        """Options of the perplexity evaluator."""

        data: str = Field(description="source or path of the evaluation text")
        window: int | None = Field(None, ge=2, description="tokens a window; by default the context, at most 2048")
        limit: int | None = Field(None, ge=1, description="score only the first so many windows")
        source_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return perplexity, loss, and what they were measured on; items are windows, with the loss of each."""
        source = subject.source(self.options.data, self.options.source_options)
        if not isinstance(source, TextSource):
            raise PruneForgeError(f"perplexity needs text, and source {source.name!r} gives none")
        model = subject.model
        can_generate = getattr(model.module, "can_generate", None)
        if can_generate is not None and not can_generate():
            raise PruneForgeError(
                f"perplexity is of models that predict the next token, and {type(model.module).__name__} does not"
            )
        windows, warnings = text_windows(subject, source, self.options.window, self.options.limit)
        losses = self._losses(subject, windows)
        mean = losses.mean().item()
        if not mean < LARGEST_LOSS:
            raise PruneForgeError(
                f"the model's loss on {self.options.data!r} is {mean:.6g}, too large for a perplexity; check the "
                "model's weights and dtype"
            )
        return {
            "perplexity": math.exp(mean),
            "loss": mean,
            "data": {"source": self.options.data, **source.describe("evaluation")},
            "window": windows.shape[1],
            "windows": len(windows),
            "tokens": windows.numel(),
            "warnings": warnings,
            **({"items": self._items(losses)} if subject.items else {}),
        }

    def _items(self, losses: torch.Tensor) -> dict[str, list[Any]]:
        return {"id": [str(number) for number in range(len(losses))], "loss": losses.tolist()}

    def _losses(self, subject: Subject, windows: torch.Tensor) -> torch.Tensor:
        """Return each window's mean loss [windows], float64 on the CPU."""
        model = subject.model
        size = subject.samples_a_batch(windows.shape[1])
        losses = []
        with torch.no_grad():
            for chunk in subject.progress.track(windows.split(size), "perplexity"):
                batch = model.adapter.batch(chunk, model.module).to(subject.device)
                losses.append(model.adapter.losses(model.adapter.forward(model.module, batch), batch).double().cpu())
        return torch.cat(losses)
