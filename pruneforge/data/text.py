"""Text as calibration and evaluation data: documents, and token windows cut from them."""

from __future__ import annotations

import functools
import random
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces import options
from pruneforge.interfaces.source import Request, Source

Part = Literal["calibration", "evaluation"]


class TextSource(Source):
    """A source of text documents.

    Attributes:
        separator: Text between documents when they are joined.
    """

    separator: ClassVar[str] = "\n\n"

    class Options(options.Options):
        """Options of every text source."""

        pack: bool = Field(
            False,
            description="join short documents and cut the result, instead of cropping documents that are long enough",
        )

    options: Options

    @abstractmethod
    def documents(self, part: Part) -> Sequence[str]:
        """Return the documents of one part; a source without parts returns the same for both.

        Raises:
            PruneForgeError: The documents cannot be loaded.
        """

    def calibration(self, request: Request) -> Iterable[Mapping[str, Tensor]]:
        """Yield batches `{"input_ids": int64 [samples, seqlen]}`.

        Raises:
            PruneForgeError: There is no tokenizer, or too little text.
        """
        if request.seqlen is None:
            raise PruneForgeError(f"source {self.name!r} gives text; set the tokens in a sample with `seqlen`")
        documents = self.documents("calibration")
        if not any(document.strip() for document in documents):
            raise PruneForgeError(f"source {self.name!r} holds no text")
        cut = packed if self.options.pack else crops
        windows = cut(documents, self.name, request, request.seqlen)
        for start in range(0, len(windows), request.batch_size):
            yield {"input_ids": torch.stack(windows[start : start + request.batch_size])}


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Return the token ids of a text, int64 [tokens], with the special tokens that the tokenizer adds.

    Raises:
        PruneForgeError: There is no tokenizer.
    """
    if not callable(tokenizer):  # none, or the image transform of a model of images
        raise PruneForgeError(
            "the model came without a tokenizer, which text needs; pass processor=, or batches of token ids"
        )
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def crops(documents: Sequence[str], source: str, request: Request, seqlen: int) -> list[Tensor]:
    """Return random crops of random documents longer than `seqlen`, drawn with replacement.

    Random numbers are drawn as in the common code of the published methods' authors, so the same seed and documents
    give the same samples.

    Returns:
        `samples` tensors, int64 [seqlen].

    Raises:
        PruneForgeError: No document is long enough, or the long ones hold fewer tokens than the samples.
    """
    tokenizer, samples, progress = request.processor, request.samples, request.progress
    generator = random.Random(request.seed)
    lengths: dict[int, int] = {}  # in tokens, of the documents tokenised so far

    @functools.lru_cache(maxsize=16)  # a single long file is drawn from many times
    def tokens_of(index: int) -> Tensor:
        return tokenize(tokenizer, documents[index])

    def draw() -> Tensor:
        while True:
            index = generator.randint(0, len(documents) - 1)
            if lengths.get(index, seqlen + 1) > seqlen:
                tokens = tokens_of(index)
                lengths[index] = len(tokens)
                if len(tokens) > seqlen:
                    start = generator.randint(0, len(tokens) - seqlen - 1)
                    return tokens[start : start + seqlen]
                if len(lengths) == len(documents):
                    check_longest()

    def check_longest() -> None:
        longest = max(lengths.values())
        if longest <= seqlen:
            raise PruneForgeError(
                f"source {source!r} has no document longer than {seqlen} tokens (the longest has {longest}); use a "
                "shorter `seqlen`, or join them: `source_options` pack=true"
            )

    def check_total() -> None:
        available = sum(length for length in lengths.values() if length > seqlen)
        if len(lengths) == len(documents) and available < samples * seqlen:
            raise PruneForgeError(
                f"source {source!r} has {available} tokens in documents longer than {seqlen}, too little for {samples} "
                "samples, which would repeat one another; use fewer `samples` or a shorter `seqlen`"
            )

    # A token usually has a byte or more. If more tokens are wanted than there are bytes, check before drawing.
    if samples * seqlen > _bytes(documents, samples * seqlen):
        lengths = {index: len(tokens_of(index)) for index in range(len(documents))}
        check_longest()
        check_total()
    windows = [draw() for _ in progress.track(range(samples), "drawing calibration samples")]
    check_total()
    return windows


def _bytes(documents: Sequence[str], enough: int) -> int:
    """Return the size of the documents in bytes, counted until it reaches `enough`."""
    size = 0
    for document in documents:
        size += len(document.encode())
        if size >= enough:
            break
    return size


def packed(documents: Sequence[str], source: str, request: Request, seqlen: int) -> list[Tensor]:
    """Return random windows of the documents joined end to end, without replacement.

    Returns:
        `samples` tensors, int64 [seqlen].

    Raises:
        PruneForgeError: The documents hold fewer than `samples` windows.
    """
    samples = request.samples
    texts = [document for document in documents if document.strip()]
    stream = torch.cat([tokenize(request.processor, text) for text in request.progress.track(texts, "tokenising")])
    available = len(stream) // seqlen
    if available < samples:
        raise PruneForgeError(
            f"source {source!r} holds {len(stream)} tokens, {available} samples of {seqlen}, and {samples} were "
            "asked for; use fewer `samples` or a shorter `seqlen`"
        )
    windows = stream[: available * seqlen].view(available, seqlen)
    return [windows[index] for index in random.Random(request.seed).sample(range(available), samples)]
