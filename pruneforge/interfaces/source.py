"""The interface of a calibration source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.registry import Registry
from pruneforge.progress import Progress


@dataclass(frozen=True)
class Request:
    """What a run wants of a source.

    Attributes:
        processor: The model's tokenizer or image transform; `None` if the model came without one.
        samples: Number of sequences or images.
        seqlen: Tokens a sequence; `None` where that has no meaning.
        batch_size: Samples a batch.
        seed: Seed of every random choice.
        progress: Where to show how far along reading is.
    """

    processor: Any
    samples: int
    seqlen: int | None
    batch_size: int
    seed: int
    progress: Progress = field(default_factory=Progress)


class Source(Configurable, ABC):
    """Gives calibration data. The same request gives the same data."""

    @classmethod
    def reads(cls, path: str) -> bool:
        """Return whether this source reads the local file or folder `path`, which becomes its `argument`."""
        return False

    def describe(self, part: Literal["calibration", "evaluation"]) -> dict[str, Any]:
        """Return what names the data of one part, for the report: dataset, revision, split, file."""
        return {}

    def warnings(self) -> list[str]:
        """Return what a user has to know of the data last given, one line each."""
        return []

    @abstractmethod
    def calibration(self, request: Request) -> Iterable[Mapping[str, Tensor]]:
        """Yield batches in the form that the model's adapter takes.

        Raises:
            PruneForgeError: The source cannot be had, or holds too little.
        """


def create_source(data: str | Path, options: Mapping[str, Any], registry: Registry) -> Source:
    """Return the source of a registered name, `name:argument`, or local path.

    Raises:
        PruneForgeError: It is neither, or no source reads the path.
    """
    text = str(data)
    names = [entry.name for entry in registry.entries("source")]
    if text.partition(":")[0] in names:
        return registry.create("source", text, options)
    for entry in registry.entries("source"):
        try:
            cls = entry.load()
        except PruneForgeError:
            continue  # `pruneforge plugins` shows it; another source may read the path
        if issubclass(cls, Source) and cls.reads(text):
            return registry.create("source", f"{entry.name}:{text}", options)
    if Path(text).exists():
        raise PruneForgeError(f"no source reads {text!r}; installed are {', '.join(names)}")
    near = unknown_name("source", text, names)
    raise PruneForgeError(f"{near}, and there is no file or folder {text!r}")
