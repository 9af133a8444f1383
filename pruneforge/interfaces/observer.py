"""The interface of observers, which log a run elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from pruneforge.interfaces import options

Value = bool | int | float | str


class Observer(options.Configurable, ABC):
    """Logs a run elsewhere, such as in a tracker of experiments; each run has an observer of its own.

    It only sends what it is given. One that fails to start ends the run before the first block; one that fails later is
    called no more, and a warning of the run says why. It has no say in the output, and is not part of the recipe.
    """

    argument: ClassVar[str | None] = "project"

    class Options(options.Options):
        """Options of every observer."""

        project: str = Field("pruneforge", min_length=1, description="project, or experiment, that the run belongs to")
        name: str | None = Field(
            None, description="what the run is called; by default as its output folder, or by metric and pattern"
        )

    @abstractmethod
    def start(self, name: str, config: Mapping[str, Value]) -> None:
        """Begin to log, before the first block is calibrated.

        Called in the first of several processes alone, as all methods are.

        Args:
            name: What the run is called; runs of one pass have different names.
            config: The recipe, without what was not given; nested settings have names such as `options/alpha`.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a pruned block.

        Args:
            step: Position of the block, from 0.
            values: `block/sparsity`, the share of the block's weights that are pruned, and `block/notes`, how many
                notes the metric made about it.
        """

    @abstractmethod
    def close(self, summary: Mapping[str, Value] | None) -> None:
        """End the log; of a finished run, everything is written by then.

        Args:
            summary: `run/sparsity`, `run/seconds/...` by stage, `run/peak_memory/...` in bytes, and `run/warnings` as a
                text if there are any; `None` for a run that failed or was interrupted.
        """
