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
    """Parameters of a draw from a source.

    Attributes:
        processor: The model's tokenizer or image transform; `None` if the model came without one.
        samples: Number of sequences or images.
        seqlen: Tokens per sequence; `None` for data without a length.
        batch_size: Samples per batch.
        seed: Seed of every random choice.
        progress: Progress bars.
    """

    processor: Any
    samples: int
    seqlen: int | None
    batch_size: int
    seed: int
    progress: Progress = field(default_factory=Progress)


class Source(Configurable, ABC):
    """A source of calibration data; the same request gives the same data.

    Attributes:
        seeded: Whether another seed gives other data.
    """

    seeded: bool = True

    @classmethod
    def reads(cls, path: str) -> bool:
        """Return whether this source reads the local file or folder `path`, which becomes its `argument`."""
        return False

    def describe(self, part: Literal["calibration", "evaluation"]) -> dict[str, Any]:
        """Return what identifies the data of one part in the report: data set, revision, split, file."""
        return {}

    def warnings(self) -> list[str]:
        """Return warnings about the last draw, one line each."""
        return []

    @abstractmethod
    def calibration(self, request: Request) -> Iterable[Mapping[str, Tensor]]:
        """Yield batches in the form that the model's adapter takes.

        Raises:
            PruneForgeError: The data cannot be loaded, or are too few.
        """


def create_source(data: str | Path, options: Mapping[str, Any], registry: Registry) -> Source:
    """Return the source of a registered name, `name:argument`, or local path.

    Raises:
        PruneForgeError: It is neither, or no source reads the path.
    """
    return registry.create("source", source_spec(data, registry), options)


def source_spec(data: str | Path, registry: Registry) -> str:
    """Return `name` or `name:argument` of the source that gives `data`: a path is the argument of who reads it.

    Raises:
        PruneForgeError: It is neither a registered source nor a path, or no source reads the path.
    """
    text = str(data)
    names = [entry.name for entry in registry.entries("source")]
    if text.partition(":")[0] in names:
        return text
    for entry in registry.entries("source"):
        try:
            cls = entry.load()
        except PruneForgeError:
            continue  # `pruneforge plugins` shows it; another source may read the path
        if entry.lacking() is None and issubclass(cls, Source) and cls.reads(text):
            return f"{entry.name}:{text}"
    if Path(text).exists():
        raise PruneForgeError(f"no source reads {text!r}; installed are {', '.join(names)}")
    near = unknown_name("source", text, names)
    raise PruneForgeError(f"{near}, and there is no file or folder {text!r}")
