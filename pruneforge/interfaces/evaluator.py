"""The interface of an evaluator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces import options
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.source import Source, create_source
from pruneforge.memory import usual_tokens_a_batch
from pruneforge.progress import Progress

if TYPE_CHECKING:
    from pruneforge.interfaces.adapter import LoadedModel
    from pruneforge.interfaces.registry import Registry


@dataclass(frozen=True)
class Subject:
    """The model to evaluate, and what an evaluator needs to do so.

    Attributes:
        model: The model with its adapter and processor, on `device`.
        device: Where it runs.
        batch_size: Samples per batch; `None` lets the evaluator choose.
        seed: Seed of every random choice.
        registry: To look up sources.
        calibration: The report's `calibration` entry of a pruned model, else `None`.
        progress: Progress bars.
        items: Whether to keep a record of each item; see `Evaluator.evaluate`.
        made_of: Folder or hub id of the dense model that a pruned model was made of, else `None`.
        loader: Loads a folder or hub id to compare the model with.
        sizes: Batch sizes that were chosen where none was asked for; if memory is full, a smaller one is tried.
    """

    model: LoadedModel
    device: torch.device
    batch_size: int | None
    seed: int
    registry: Registry
    calibration: dict[str, Any] | None = None
    progress: Progress = field(default_factory=Progress)
    items: bool = False
    made_of: str | None = None
    loader: Callable[[str], LoadedModel] | None = None
    sizes: list[int] = field(default_factory=list)

    def source(self, data: str, options: Mapping[str, Any]) -> Source:
        """Return the source of evaluation data.

        Args:
            data: Name of a source, `name:argument`, or a path.
            options: Options of the source.

        Raises:
            PruneForgeError: There is no such source or path, no source reads the path, or it has no such option.
        """
        return create_source(data, options, self.registry)

    def original(self, reference: str | None = None) -> LoadedModel:
        """Return the dense model that this one was made of, on `device` and in the same dtype.

        A model that was never pruned is its own original.

        Args:
            reference: Its folder or hub id, from an option that evaluators call `dense`; `None` for the one that the
                pruned model's report names.

        Raises:
            PruneForgeError: It cannot be loaded.
        """
        reference = reference or self.made_of
        if reference is None:
            return self.model
        try:
            if self.loader is None:
                raise PruneForgeError(f"nothing here loads {reference!r}")
            return self.loader(reference)
        except PruneForgeError as error:
            raise PruneForgeError(
                f"the dense model to compare with cannot be loaded: {error}; name its folder or hub id with `dense`"
            ) from error

    def samples_a_batch(self, tokens: int) -> int:
        """Return the batch size asked for, or the default for samples of `tokens` tokens each."""
        return self.batch_size_or(max(1, usual_tokens_a_batch(self.device) // tokens))

    def batch_size_or(self, usual: int) -> int:
        """Return the batch size asked for, or the evaluator's usual one."""
        if self.batch_size is not None:
            return self.batch_size
        self.sizes.append(usual)
        return usual


class Evaluator(Configurable, ABC):
    """A task's own harness; a subclass implements `evaluate`, and `registry.evaluator` registers it.

    Attributes:
        measure: Name of the result by which models are compared.
        higher_is_better: Whether a higher one is better.
        share: Whether it is a share, which tables show in percent.
        measured: Names of results that differ between two evaluations of one model, such as times.
    """

    measure: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    share: ClassVar[bool] = False
    measured: ClassVar[frozenset[str]] = frozenset()

    class Options(options.Options):
        """Options of every evaluator."""

    @abstractmethod
    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return the results, of types that JSON holds, with everything needed to compare them.

        A `warnings` entry, a list of texts, is shown to the user.

        With `subject.items`, an `items` entry has a record of each item that was measured (an image, a window of text,
        a question): lists by column, each with an entry for each item, in an order that does not vary. The column `id`
        has a text that no other item has, and each of the others has numbers alone, or texts alone. Where the measure
        is a mean over items, the column of its name has that of each item.

        Raises:
            PruneForgeError: The data or the model does not fit the task.
        """
