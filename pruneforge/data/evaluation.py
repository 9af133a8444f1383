"""Data that evaluators measure on: windows of a text, and images in batches."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pruneforge.data.images import ImageProcessor, ImageSet, Loaded, Reading, image_processor, load_image
from pruneforge.data.overlap import shared
from pruneforge.data.text import TextSource, tokenize
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.evaluator import Subject

LONGEST = 2048
"""Tokens a window unless more are asked for: the published length. A model's own context can be far longer."""

IMAGES_A_BATCH = 64
"""Images in a batch unless another number is asked for."""


def text_windows(
    subject: Subject, source: TextSource, window: int | None, limit: int | None
) -> tuple[Tensor, list[str]]:
    """Cut the evaluation text of a source into consecutive windows.

    As in the published protocol, the documents are joined (by a blank line, unless the source says otherwise) and
    tokenised as one text; the tail, shorter than a window, is dropped.

    Args:
        subject: The model that is evaluated, with its tokenizer.
        source: The source of the text.
        window: Tokens a window; `None` for the model's context, at most `LONGEST`.
        limit: Return only the first so many windows.

    Returns:
        Token ids, int64 [windows, window], and a warning if the text holds some of the calibration text.

    Raises:
        PruneForgeError: There is no tokenizer, the window is longer than the context, or the text shorter than one.
    """
    model = subject.model
    context = model.adapter.context_length(model.module)
    length = window or min(context or LONGEST, LONGEST)
    if context and length > context:
        raise PruneForgeError(f"window {length} is longer than the model's context of {context} tokens")
    tokens = _tokens(model.processor, source.separator.join(source.documents("evaluation")))
    count = len(tokens) // length
    if count == 0:
        raise PruneForgeError(
            f"source {source.name!r} holds {len(tokens)} tokens, less than one window of {length}; "
            "use a shorter `window` or more text"
        )
    count = min(count, limit or count)
    sketched = (subject.calibration or {}).get("sketch")
    share = shared(sketched, tokens) if sketched else 0.0
    flattered = f"about {share:.0%} of the calibration text stands in the evaluation text too; the result is flattered"
    return tokens[: count * length].view(count, length), [flattered] if share > 0 else []


@dataclass(frozen=True)
class _Tokenised:
    """A text with a tokenizer that equals another one of the same content."""

    content: str
    text: str
    tokenizer: Any = field(compare=False)


def _tokens(tokenizer: Any, text: str) -> Tensor:
    """Return the token ids of a text, int64 [tokens]; a study evaluates many models on the same one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # it does not say what it is made of
        return tokenize(tokenizer, text)
    return _recent_tokens(_Tokenised(backend.to_str(), text, tokenizer))


@functools.lru_cache(maxsize=4)
def _recent_tokens(asked: _Tokenised) -> Tensor:
    return tokenize(asked.tokenizer, asked.text)


def image_batches(
    subject: Subject,
    images: ImageSet,
    chosen: Sequence[int],
    reading: Reading,
    *,
    workers: int | None = None,
    strict: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read images in other processes and preprocess them as the model's checkpoint says.

    Args:
        subject: The model that is evaluated, with its image transform.
        images: The images.
        chosen: Indices of those to read, in this order.
        reading: Where images that could not be read, or were converted, are recorded.
        workers: Number of processes; 0 to read in this one, `None` for one less than there are cores.
        strict: Fail on a corrupt image instead of leaving it out.

    Yields:
        Indices of the readable images of a batch, and their pixels [samples, channels, height, width].

    Raises:
        PruneForgeError: The model takes no images, or one is corrupt and `strict` is true.
    """
    processor = image_processor(subject.model.processor)
    workers, size = max(1, _cores() - 1) if workers is None else workers, subject.batch_size_or(IMAGES_A_BATCH)
    workers = min(workers, -(-len(chosen) // size))  # each reads whole batches
    loader = DataLoader(
        _Preprocessed(images, processor, chosen),
        size,
        num_workers=workers,
        collate_fn=list,
        prefetch_factor=2 if workers else None,
    )
    for batch in subject.progress.track(loader, "images"):
        for index, loaded in batch:
            reading.note(images.name(index), loaded, processor.mode, strict)
        readable = [(index, loaded.pixels) for index, loaded in batch if loaded.pixels is not None]
        if readable:
            yield [index for index, _ in readable], torch.stack([pixels for _, pixels in readable])


def spread(total: int, limit: int | None) -> list[int]:
    """Return the indices of `total` items, or of `limit` of them that are spread evenly."""
    if limit is None or limit >= total:
        return list(range(total))
    return [place * total // limit for place in range(limit)]


def unique_names(images: ImageSet, indices: Sequence[int]) -> list[str]:
    """Return the names of images, those that several of them have with the image's index."""
    names = [images.name(index) for index in indices]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for name, index in zip(names, indices, strict=True)]


class _Preprocessed(Dataset):
    def __init__(self, images: ImageSet, processor: ImageProcessor, chosen: Sequence[int]) -> None:
        self.images, self.processor, self.chosen = images, processor, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[int, Loaded]:
        index = self.chosen[place]
        return index, load_image(self.images, index, self.processor)


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
