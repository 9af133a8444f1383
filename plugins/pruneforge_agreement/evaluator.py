"""Agreement of a pruned model with the dense one, on data that need no labels."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pruneforge import Evaluator, ImageSource, LoadedModel, PruneForgeError, Subject, TextSource
from pruneforge.data.evaluation import image_batches, spread, text_windows, unique_names
from pruneforge.data.images import Reading

POSITIONS = 256
"""Tokens whose distributions are compared together: a window of them over a large vocabulary takes gigabytes."""

ALONE = (
    "no report was found that says what the model was made of, so it was compared with itself; `dense` names another"
)
"""The warning about a model that was never pruned, or was pruned in memory and came without its result."""

Pair = tuple[float, float]
"""Agreement and divergence of a window or an image."""

Measured = tuple[list[str], list[Pair], dict[str, Any]]
"""Names of windows or images, what was measured of each, and how many they are, with warnings."""


class Agreement(Evaluator):
    """How often a pruned model predicts what the dense one does, and how far their predictions are apart.

    For each token of a text, cut into windows as for the published perplexities, or for each image:

    - `agreement`: whether both models find the same class, or next token, the likeliest (1 or 0),
    - `kl`: the Kullback-Leibler divergence KL(p || q) = sum p (log p - log q), in nats, of the distribution p that
      the dense model predicts and q that the pruned one predicts.

    Results are means over tokens or images. The data need no labels. A model that was never pruned is compared with
    itself.
    """

    measure = "agreement"
    higher_is_better = True
    share = True

    class Options(Evaluator.Options):
        """Options of the agreement evaluator."""

        data: str = Field(description="source or path of text or images, without labels")
        dense: str | None = Field(
            None, description="folder or hub id of the dense model; by default the one that was pruned"
        )
        window: int | None = Field(
            None, ge=2, description="of text: tokens a window; by default the context, at most 2048"
        )
        limit: int | None = Field(
            None, ge=1, description="only the first so many windows, or so many images, spread evenly over the data"
        )
        workers: int | None = Field(None, ge=0, description="of images: processes that read them; by default by cores")
        source_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return agreement and divergence, and what they were measured on; items are windows or images."""
        source = subject.source(self.options.data, self.options.source_options)
        dense = subject.original(self.options.dense)
        if isinstance(source, TextSource):
            names, pairs, measured_on = self._of_text(subject, dense, source)
        elif isinstance(source, ImageSource):
            names, pairs, measured_on = self._of_images(subject, dense, source)
        else:
            raise PruneForgeError(f"agreement needs text or images, and source {source.name!r} gives neither")
        if not pairs:
            raise PruneForgeError(f"{self.options.data!r} holds no readable image")
        agreement, divergence = ([pair[place] for pair in pairs] for place in (0, 1))
        if not math.isfinite(sum(divergence)):
            raise PruneForgeError(f"what a model predicts on {self.options.data!r} is not finite; check its weights")
        if dense is subject.model:
            measured_on["warnings"].append(ALONE)
        return {
            "agreement": fmean(agreement),
            "kl": fmean(divergence),
            "dense": dense.reference,
            "data": {"source": self.options.data, **source.describe("evaluation")},
            **measured_on,
            **({"items": {"id": names, "agreement": agreement, "kl": divergence}} if subject.items else {}),
        }

    def _of_text(self, subject: Subject, dense: LoadedModel, source: TextSource) -> Measured:
        """Return what is measured of each window."""
        windows, warnings = text_windows(subject, source, self.options.window, self.options.limit)
        parts = windows.split(subject.samples_a_batch(windows.shape[1]))
        pairs = [pair for ids in subject.progress.track(parts, "agreement") for pair in _pairs(subject, dense, ids)]
        size = {"window": windows.shape[1], "windows": len(windows), "tokens": windows.numel()}
        return [str(number) for number in range(len(windows))], pairs, {**size, "warnings": warnings}

    def _of_images(self, subject: Subject, dense: LoadedModel, source: ImageSource) -> Measured:
        """Return what is measured of each readable image."""
        images, reading = source.images("evaluation"), Reading()
        chosen, strict = spread(len(images), self.options.limit), source.options.strict
        readable: list[int] = []
        pairs: list[Pair] = []
        for indices, pixels in image_batches(
            subject, images, chosen, reading, workers=self.options.workers, strict=strict
        ):
            readable += indices
            pairs += _pairs(subject, dense, pixels)
        size = {"images": len(pairs), "skipped": len(reading.corrupt)}
        return unique_names(images, readable), pairs, {**size, "warnings": reading.warnings()}


def _pairs(subject: Subject, dense: LoadedModel, data: Tensor) -> list[Pair]:
    """Return the agreement and the divergence of each sample of a batch.

    Raises:
        PruneForgeError: The models predict different numbers of classes or tokens.
    """
    with torch.inference_mode():
        expected, predicted = (_logits(model, data, subject.device) for model in (dense, subject.model))
        if expected.shape != predicted.shape:
            raise PruneForgeError(
                f"the dense model {dense.reference!r} predicts one of {expected.shape[-1]} classes or tokens, and this "
                f"model one of {predicted.shape[-1]}"
            )
        return [_pair(*logits) for logits in zip(expected, predicted, strict=True)]


def _logits(model: LoadedModel, data: Tensor, device: torch.device) -> Tensor:
    """Return a model's logits [samples, classes] or [samples, tokens, classes]."""
    batch = model.adapter.batch(data, model.module).to(device)
    return model.adapter.logits(model.adapter.forward(model.module, batch))


def _pair(expected: Tensor, predicted: Tensor) -> Pair:
    """Return the agreement and the divergence of one sample, in float32 or better, from logits [..., classes]."""
    rows = [logits.reshape(-1, logits.shape[-1]) for logits in (expected, predicted)]
    parts = [_of_positions(*part) for part in zip(*(each.split(POSITIONS) for each in rows), strict=True)]
    same, divergence = (torch.cat(measured).double().mean().item() for measured in zip(*parts, strict=True))
    return same, divergence


def _of_positions(expected: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the likeliest class is the same, and the divergence, [positions], from [positions, classes]."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    p, q = (logits.to(wide).log_softmax(-1) for logits in (expected, predicted))
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return expected.argmax(-1) == predicted.argmax(-1), divergence
