"""Pairs of texts from a file of JSON Lines."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from pruneforge import Options as OptionsOfAny
from pruneforge import PruneForgeError, Request, Source
from pruneforge.documents import parse_json, read_text


class Pairs(Source):
    """Pairs of texts, such as questions and answers: each line of a file is a JSON object with both.

    Pairs are drawn without replacement. A pair is two samples, the query and then its positive; an even `batch_size`
    keeps both in one batch. Texts longer than `seqlen` are cut, and shorter ones padded to the longest of their batch.
    """

    argument = "path"

    class Options(OptionsOfAny):
        """Options of a file of pairs."""

        path: str = Field(description="the file, JSON Lines")
        query: str = Field("query", description="field that holds the query")
        positive: str = Field("positive", description="field that holds the text that belongs to it")

    options: Options

    def calibration(self, request: Request) -> Iterable[Mapping[str, Tensor]]:
        """Yield batches with `input_ids` and `attention_mask`, int64 [samples, tokens].

        Raises:
            PruneForgeError: There is no tokenizer or length, the file cannot be read, or it holds too few pairs.
        """
        if not callable(request.processor):
            raise PruneForgeError("the model came without a tokenizer, which text needs; pass processor=, or batches")
        if request.seqlen is None:
            raise PruneForgeError(f"source {self.name!r} gives text; set the most tokens of a sample with `seqlen`")
        if request.samples % 2:
            raise PruneForgeError(f"a pair is two samples; {request.samples} `samples` are not a number of pairs")
        pairs, wanted = self.pairs(), request.samples // 2
        if len(pairs) < wanted:
            raise PruneForgeError(
                f"source {self.name!r} holds {len(pairs)} pairs, and {request.samples} samples are {wanted}; use fewer "
                "`samples`"
            )
        drawn = random.Random(request.seed).sample(pairs, wanted)
        texts = [text for pair in drawn for text in pair]
        for start in range(0, len(texts), request.batch_size):
            some = texts[start : start + request.batch_size]
            made = request.processor(
                some, truncation=True, max_length=request.seqlen, padding=True, return_tensors="pt"
            )
            yield {name: made[name] for name in ("input_ids", "attention_mask")}

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs of the file.

        Raises:
            PruneForgeError: It cannot be read, or a line is not a pair.
        """
        path, fields = self.options.path, (self.options.query, self.options.positive)
        lines = read_text(Path(path), "file of pairs").split("\n")
        found = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, "line")
                query, positive = (row[name] for name in fields)
            except (PruneForgeError, KeyError, TypeError):
                query = positive = None
            if not (isinstance(query, str) and isinstance(positive, str) and query.strip() and positive.strip()):
                raise PruneForgeError(
                    f"line {number} of {path!r} is not a JSON object with text in fields {fields[0]!r} and "
                    f"{fields[1]!r}; name others with `source_options` query=NAME, positive=NAME"
                )
            found.append((query, positive))
        return found

    def describe(self, part: str) -> dict[str, Any]:
        """Return the name and hash of the file."""
        path = Path(self.options.path)
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
