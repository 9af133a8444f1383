"""The interface of an evaluator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pruneforge.options import Configurable
from pruneforge.progress import Progress

if TYPE_CHECKING:
    from pruneforge.model import LoadedModel
    from pruneforge.registry import Registry


@dataclass(frozen=True)
class Subject:
    """What is to be evaluated, and where.

    Attributes:
        model: The model with its adapter and processor, on `device`.
        device: Where it runs.
        batch_size: Samples a batch; `None` lets the evaluator choose.
        seed: Seed of every random choice.
        registry: To look up sources.
        calibration: The report's `calibration` entry of a pruned model, else `None`.
        progress: Where to show how far along the evaluation is.
    """

    model: LoadedModel
    device: torch.device
    batch_size: int | None
    seed: int
    registry: Registry
    calibration: dict[str, Any] | None = None
    progress: Progress = field(default_factory=Progress)


class Evaluator(Configurable, ABC):
    """A task's own harness."""

    @abstractmethod
    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return the results, of types that JSON holds, with everything needed to compare them.

        A `warnings` entry, a list of texts, is shown to the user.

        Raises:
            PruneForgeError: The data or the model does not fit the task.
        """
