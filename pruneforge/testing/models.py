"""The tiny models that registered adapters bring, for checks that need a whole model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter, Example
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.plugins import Plugins, loaded_plugins
from pruneforge.runs.job import make_job
from pruneforge.runs.result import PruneResult

C = TypeVar("C")
T = TypeVar("T")


def adapters() -> Iterator[Adapter]:
    """Yield the registered adapters whose libraries are installed."""
    registry = loaded_plugins().registry
    for entry in registry.entries("adapter"):
        try:
            adapter: Adapter = registry.create("adapter", entry.name)
        except PruneForgeError:
            continue  # `pruneforge plugins` says why
        yield adapter


def examples(each: int | None = None) -> Iterator[tuple[Adapter, Example]]:
    """Yield the examples of all registered adapters with their adapters, at most `each` of one adapter."""
    for adapter in adapters():
        for example in _examples(type(adapter))[:each]:
            yield adapter, example


@functools.cache
def _examples(kind: type[Adapter]) -> Sequence[Example]:
    """Return an adapter's examples, which checks copy and do not change."""
    return tuple(kind().examples())


def first_that_works(candidates: Iterable[C], work: Callable[[C], T]) -> tuple[T | None, str]:
    """Return what `work` gives for the first candidate that it does not fail on; or `None`, and why each failed."""
    reasons: list[str] = []
    for candidate in candidates:
        try:
            return work(candidate), ""
        except PruneForgeError as error:
            reasons.append(str(error))
        except Exception as error:  # a plugin may fail in any way
            reasons.append(f"{type(error).__name__}: {error}")
    return None, "; ".join(dict.fromkeys(reasons)) or "no adapter brings an example"


def fresh(example: Example, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Any]]:
    """Return a copy of an example's model in `dtype`, and its batches."""
    return copy.deepcopy(example.module).to(dtype), [tree_map(lambda value: _as(value, dtype), b) for b in example.data]


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def layers_of(adapter: Adapter, module: nn.Module) -> list[Layer]:
    """Return the layers of all blocks."""
    return [layer for block in adapter.blocks(module) for layer in block.layers]


def prune_with(adapter: Adapter, model: nn.Module | Path, metric: Metric, **settings: Any) -> PruneResult:
    """Prune as `pruneforge.prune` does, with this adapter, whether it is registered or not, and no other."""
    plugins = Plugins()
    plugins.registry.adapter(adapter.name, type(adapter))
    options = adapter.options.model_dump()
    job = make_job(model, metric, adapter_options=options, device="cpu", **settings)
    return replace(job, plugins=plugins).run()[0]


def readable(output: Any, batch: Batch) -> list[Tensor]:
    """Return the tensors in a model's output, without what stands at padding."""
    found = []
    for value in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(value, Tensor):
            padded = batch.valid is not None and value.shape[:2] == batch.valid.shape
            found.append(value.detach()[batch.valid] if padded else value.detach())
    return found
