"""The interface of an adapter: how an architecture is loaded, split, run and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruneforge.checkpoint.shards import Checkpoint

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.options import Configurable


@dataclass(frozen=True)
class Block:
    """One repeated transformer layer, the unit of the loop.

    Attributes:
        name: Full name in the model.
        module: Maps hidden states to hidden states of the next block.
        layers: Its prunable weight matrices, in the order their masks are made.
    """

    name: str
    module: nn.Module = field(repr=False)
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        module: The model; its parameters are on the meta device, its buffers are not.
        processor: Its tokenizer or image transform.
        folder: Holds its weights as safetensors files whose tensors are called as the model's.
    """

    module: nn.Module = field(repr=False)
    processor: Any
    folder: Path


class Adapter(Configurable, ABC):
    """Says how an architecture splits into stem, blocks and head, and how to run it.

    The blocks must form a chain: each receives the hidden states that the one before returned, as its
    first argument. Everything else a block is called with (masks, positions) is recorded by the engine,
    for each block and batch.
    """

    @abstractmethod
    def declines(self, reference: str) -> str | None:
        """Return why this adapter cannot load `reference` (a folder or hub id), or `None` if it can.

        Reads the configuration, not the weights.
        """

    @abstractmethod
    def declines_module(self, module: nn.Module) -> str | None:
        """Return why this adapter cannot split `module`, or `None` if it can."""

    @abstractmethod
    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
        """Return the model on the CPU, and its processor (tokenizer or image transform).

        Args:
            reference: A folder or hub id that `declines` did not decline.
            dtype: Dtype of the weights; `None` keeps the checkpoint's.
        """

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        """Return the model without its weights, or `None` if it cannot be had so or has no safetensors files.

        With it a checkpoint is pruned block by block and never held whole.

        Args:
            reference: A folder or hub id that `declines` did not decline.
            dtype: Dtype to compute in; `None` for that which `load` chooses.
        """
        return None

    def processor(self, module: nn.Module) -> Any:
        """Return the processor of a model given from Python, where the model itself says how its data are made."""
        return None

    @abstractmethod
    def save(self, module: nn.Module, processor: Any, folder: Path) -> None:
        """Write the model and its processor to `folder` in the layout that its own library loads."""

    @abstractmethod
    def blocks(self, module: nn.Module) -> list[Block]:
        """Return the blocks in the order they run."""

    @abstractmethod
    def batch(self, data: Tensor | Mapping[str, Tensor], module: nn.Module) -> Batch:
        """Return a batch for what a source or a user gave.

        Raises:
            PruneForgeError: `data` has none of the forms this architecture takes, or does not fit `module`.
        """

    @abstractmethod
    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the whole model on a batch and return its output."""

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sample's own mean loss [samples], differentiable, for what `forward` returned."""

    def logits_a_token(self, module: nn.Module) -> int:
        """Return how many logits the head makes of each token; 0 where they are few, as those of whole images.

        The engine leaves room for them where a gradient of the loss is wanted, and runs the head on fewer samples.
        """
        return 0

    def attention_heads(self, module: nn.Module) -> int:
        """Return how many attention heads a block has; 0 where samples have few tokens, as images do.

        Where a gradient is wanted on a device, the engine leaves room for a number for each head and pair of tokens.
        """
        return 0

    @abstractmethod
    def context_length(self, module: nn.Module) -> int | None:
        """Return the longest sequence the model takes, or `None` where that has no meaning."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        module: The model.
        adapter: Knows how to split, run and save it.
        processor: Its tokenizer or image transform, or `None`.
        reference: The folder or hub id it came from, or the class name of a model given from Python.
        checkpoint: Holds its weights, if the module's own parameters are vacant.
        note: Why the weights were loaded though they were to stay on disk, if so.
    """

    module: nn.Module
    adapter: Adapter
    processor: Any
    reference: str
    checkpoint: Checkpoint | None = None
    note: str | None = None
