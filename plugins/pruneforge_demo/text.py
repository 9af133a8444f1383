"""A small language model trained on Python's documentation, and this documentation as a text source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from pruneforge import Demo, TextSource
from pruneforge.data.text import Part
from pruneforge_demo import corpus


class PythonDocs(TextSource):
    """Python's language reference and library docstrings, as this installation carries them.

    Calibration and evaluation data are disjoint from each other and from the training data of the demo's model.
    """

    class Options(TextSource.Options):
        """Options of the documentation source."""

        pack: bool = Field(True, description="join documents and cut the result; most are short")

    options: Options

    def documents(self, part: Part) -> Sequence[str]:
        """Return the documents of one part."""
        return corpus.documents(part)

    def describe(self, part: Part) -> dict[str, Any]:
        """Return the part's name."""
        return {"part": part}


class TextDemo(Demo):
    """A LLaMA of 1.1 M parameters, trained by `pruneforge_demo.train_text`."""

    title: ClassVar[str] = "language model of 1.1 M parameters, text of Python's documentation"
    calibration: ClassVar[str] = "python-docs"
    samples: ClassVar[int] = 64
    seqlen: ClassVar[int | None] = 256
    task: ClassVar[str] = "perplexity"
    task_options: ClassVar[dict[str, Any]] = {"data": "python-docs", "window": 256}
    result: ClassVar[str] = "perplexity"

    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint."""
        return Path(__file__).parent / "checkpoints" / "text"
