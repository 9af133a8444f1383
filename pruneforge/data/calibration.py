"""Draw calibration data from a source, or take batches from Python, ready for the engine."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneforge.data.overlap import sketch
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.recipe import LONGEST_DEFAULT, DataRecipe
from pruneforge.interfaces.source import Request, Source
from pruneforge.progress import Progress

TOKENS_AN_IMAGE = 256
"""Assumed where data have no length to choose: about that of a 224 x 224 image in patches of 16 x 16."""

RawBatches = Iterable[Tensor | Mapping[str, Tensor]]
"""Batches as a user or a source gives them: in a form that the model's adapter takes."""

Data = str | Path | RawBatches
"""Calibration data as `pruneforge.prune` takes them: the name of a source, a path, or batches."""


@dataclass(frozen=True)
class Calibration:
    """Calibration data ready to use.

    Attributes:
        batches: The batches.
        description: Their entry in the report: source, counts, loss, fingerprint, sketch.
        warnings: Warnings about them, one line each.
    """

    batches: list[Batch]
    description: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def collect(
    data: Source | RawBatches,
    spec: str | None,
    recipe: DataRecipe,
    model: LoadedModel,
    tokens_a_batch: int,
    progress: Progress,
    processes: int = 1,
    name: str = "",
) -> Calibration:
    """Return the calibration data that a recipe asks for.

    Args:
        data: The source, or batches in a form that the model's adapter takes, which are used whole.
        spec: What the recipe calls the source.
        recipe: How many samples to draw from the source, of what length, in what batches.
        model: The model they are for.
        tokens_a_batch: Tokens that go through a block together when the recipe names no batch size.
        progress: Progress bars.
        processes: Number of processes that share the batches; without a batch size each gets at least one.
        name: Which of the recipe's streams they are, if they are one; each stream has a draw of its own.

    Raises:
        PruneForgeError: The data cannot be loaded, are too few, or longer than the model's context.
    """
    if isinstance(data, Source):
        context = model.adapter.context_length(model.module)
        length = recipe.seqlen or (min(context, LONGEST_DEFAULT) if context else None)
        if length and context and length > context:
            raise PruneForgeError(f"seqlen {length} is longer than the model's context of {context} tokens")
        fitting = tokens_a_batch // (length or TOKENS_AN_IMAGE)
        size = recipe.batch_size or max(1, min(fitting, recipe.samples // processes))
        seed = (recipe.seed + zlib.crc32(name.encode())) % 2**32 if name else recipe.seed
        request = Request(model.processor, recipe.samples, length, size, seed, progress)
        raw: RawBatches = data.calibration(request)
        origin: dict[str, Any] = {"source": spec, **data.describe("calibration")}
    else:
        raw, origin = data, {"source": "batches from Python"}
    batches = [model.adapter.batch(item, model.module) for item in progress.track(raw, "reading calibration data")]
    if not batches:
        raise PruneForgeError(f"calibration data {origin['source']!r} are empty")
    return Calibration(batches, origin | _summary(batches), data.warnings() if isinstance(data, Source) else [])


def _summary(batches: list[Batch]) -> dict[str, Any]:
    digest = hashlib.sha256()
    sequences: list[Tensor] = []
    tokens = 0
    for batch in batches:
        for key in sorted(batch.inputs):
            value = batch.inputs[key]
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        if batch.targets is not None:
            digest.update(batch.targets.cpu().numpy().tobytes())
        ids = batch.inputs.get("input_ids")
        if ids is not None:
            keep = torch.ones_like(ids, dtype=torch.bool) if batch.valid is None else batch.valid
            tokens += int(keep.sum())
            sequences += [row[kept] for row, kept in zip(ids, keep, strict=True)]
    summary: dict[str, Any] = {
        "samples": sum(batch.size for batch in batches),
        "batch_size": max(batch.size for batch in batches),
        "loss": ", or ".join(dict.fromkeys(batch.loss for batch in batches)),
        "fingerprint": digest.hexdigest(),
    }
    if sequences:
        summary |= {"tokens": tokens, "sketch": sketch(sequences)}
    return summary
