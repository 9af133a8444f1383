"""The interface of adapters: how an architecture is loaded, split, run and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruneforge.checkpoint.reader import Checkpoint

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.options import Configurable


@dataclass(frozen=True)
class Block:
    """One repeated transformer layer, the unit of the loop.

    Attributes:
        name: Full name in the model.
        module: Maps hidden states to the hidden states of the next block.
        layers: Its prunable weight matrices, in the order in which they are pruned.
    """

    name: str
    module: nn.Module = field(repr=False)
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        module: The model, with its parameters on the meta device and its buffers on the CPU.
        processor: Its tokenizer or image transform.
        folder: Folder of safetensors files; tensor names match the model's parameters.
        prefix: What the parameters' names may have before the tensors' names, if the checkpoint is one of the model
            without its head.
    """

    module: nn.Module = field(repr=False)
    processor: Any
    folder: Path
    prefix: str = ""


@dataclass(frozen=True)
class Example:
    """A tiny model with data, on which an adapter, and everything that prunes or evaluates its models, is checked.

    Attributes:
        name: What messages call it.
        module: The model, random, float32, on the CPU, with two blocks or more.
        processor: Its tokenizer or image transform, as `Adapter.load` returns it.
        data: Two batches or more in the form that `Adapter.batch` takes, of two samples or more each. One has padding
            where samples can be padded.
    """

    name: str
    module: nn.Module = field(repr=False)
    processor: Any = field(repr=False)
    data: Sequence[Tensor | Mapping[str, Tensor]] = field(repr=False)


class Adapter(Configurable, ABC):
    """Says how an architecture splits into stem, blocks and head, and how to run it.

    The blocks must form a chain: the first argument of each is the hidden states returned by the one before. The engine
    records the other arguments (masks, positions) for each block and batch.
    """

    @abstractmethod
    def declines(self, reference: str) -> str | None:
        """Return why this adapter cannot load `reference` (a folder, hub id or file), or `None` if it can.

        Reads the configuration, not the weights.
        """

    @abstractmethod
    def declines_module(self, module: nn.Module) -> str | None:
        """Return why this adapter cannot split `module`, or `None` if it can."""

    @abstractmethod
    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
        """Return the model on the CPU, and its processor (tokenizer or image transform).

        Args:
            reference: A folder, hub id or file that `declines` did not decline.
            dtype: Dtype of the weights; `None` keeps the checkpoint's.
        """

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        """Return the model without its weights, or `None` if the checkpoint cannot be streamed.

        With a skeleton, a checkpoint is pruned block by block without loading it whole.

        Args:
            reference: A folder or hub id that `declines` did not decline.
            dtype: Dtype to compute in; `None` for the one that `load` would choose.
        """
        return None

    def remarks(self, reference: str) -> Sequence[str]:
        """Return what a user must know of how `load` made the weights from a checkpoint; reports warn of it.

        Streamed models, which have the weights of their checkpoint, are not asked about.

        Args:
            reference: A folder, hub id or file that `declines` did not decline.
        """
        return ()

    def processor(self, module: nn.Module) -> Any:
        """Return the processor of a model given from Python, or `None` if the model does not describe it."""
        return None

    @abstractmethod
    def save(self, module: nn.Module, processor: Any, folder: Path) -> None:
        """Write the model and its processor to `folder`, in the layout of its own library."""

    @abstractmethod
    def blocks(self, module: nn.Module) -> list[Block]:
        """Return the blocks in the order they run."""

    @abstractmethod
    def batch(self, data: Tensor | Mapping[str, Tensor], module: nn.Module) -> Batch:
        """Return a batch of data from a source or a user.

        Raises:
            PruneForgeError: `data` is in a form that this architecture does not take, or does not fit `module`.
        """

    @abstractmethod
    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the whole model on a batch and return its output."""

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sample's own mean loss [samples], differentiable, for the result of `forward`."""

    def logits(self, output: Any) -> Tensor:
        """Return the logits in the result of `forward`: [samples, classes], or [samples, tokens, classes].

        Only evaluators that compare what models predict need them.

        Raises:
            PruneForgeError: The adapter does not say which they are.
        """
        raise PruneForgeError(f"adapter {self.name!r} does not say what a model's logits are")

    def head(self, module: nn.Module) -> Layer | None:
        """Return the layer that makes the logits, or `None`; by default the last linear layer outside of the blocks."""
        inside = {id(part) for block in self.blocks(module) for part in block.module.modules()}
        head: Layer | None = None
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and id(part) not in inside:
                head = Layer(name, part.get_parameter("weight"))
        return head

    def logits_a_token(self, module: nn.Module) -> int:
        """Return the number of logits of each token; 0 where they are few, such as those of a whole image.

        For gradients of the loss the engine reserves memory for them, and runs the head on fewer samples at a time.
        """
        return 0

    def attention_heads(self, module: nn.Module) -> int:
        """Return the number of attention heads of a block; 0 where samples have few tokens, such as images.

        For gradients on a device the engine reserves memory for a score of each head and pair of tokens.
        """
        return 0

    @abstractmethod
    def context_length(self, module: nn.Module) -> int | None:
        """Return the longest sequence that the model takes, or `None` if it has no such limit."""

    def examples(self) -> Sequence[Example]:
        """Return tiny models of the architectures that this adapter takes, made in memory, the same each time.

        `pruneforge.testing` runs its checks on them, those of metrics and evaluators too. No run uses them.
        """
        return []


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be pruned or evaluated.

    Attributes:
        module: The model.
        adapter: Its adapter.
        processor: Its tokenizer or image transform, or `None`.
        reference: The folder, hub id or file it came from, or the class name of a model given from Python.
        checkpoint: Holds its weights if the module is a skeleton; otherwise `None`.
        note: Why streaming was not possible, or `None`.
        remarks: What else a user must know of how it was loaded.
    """

    module: nn.Module
    adapter: Adapter
    processor: Any
    reference: str
    checkpoint: Checkpoint | None = None
    note: str | None = None
    remarks: Sequence[str] = ()
