"""The tiny models that registered adapters bring, for checks that need a whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter, Example
from pruneforge.plugins import loaded_plugins


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
        for example in list(adapter.examples())[:each]:
            yield adapter, example


def fresh(example: Example, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Any]]:
    """Return a copy of an example's model in `dtype`, and its batches."""
    return copy.deepcopy(example.module).to(dtype), [tree_map(lambda value: _as(value, dtype), b) for b in example.data]


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
