"""The interface of demos: a checkpoint and data that need no network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from pruneforge.interfaces.options import Configurable


class Demo(Configurable, ABC):
    """A model and data that `pruneforge demo` prunes and evaluates with every metric.

    Attributes:
        title: One line that describes the model and the data.
        calibration: Source of the calibration data.
        samples: Number of calibration samples.
        seqlen: Tokens in a sample, or `None`.
        task: Name of the evaluator.
        task_options: Options of the evaluator.
        result: The entry of the evaluator's results to show.
    """

    title: ClassVar[str]
    calibration: ClassVar[str]
    samples: ClassVar[int]
    seqlen: ClassVar[int | None] = None
    task: ClassVar[str]
    task_options: ClassVar[dict[str, Any]]
    result: ClassVar[str]

    @abstractmethod
    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint."""
