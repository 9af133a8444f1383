"""The interface of a demo: a checkpoint and data that need no network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from pruneforge.interfaces.options import Configurable


class Demo(Configurable, ABC):
    """What `pruneforge demo` prunes and evaluates, with every metric there is.

    Attributes:
        title: One line on the model and the data.
        calibration: Source of the calibration data.
        samples: Calibration samples.
        seqlen: Tokens a sample, or `None`.
        task: The evaluator, by name.
        task_options: Its options.
        result: The entry of its results to show.
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
