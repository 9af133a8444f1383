"""The interface of a calibration source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pruneforge.options import Configurable
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
