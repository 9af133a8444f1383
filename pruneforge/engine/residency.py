"""Where a model's weights are while a run visits its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from pruneforge.checkpoint.rewrite import Rewrite
from pruneforge.checkpoint.shards import Checkpoint
from pruneforge.checkpoint.skeleton import stored_parameters, vacant
from pruneforge.engine.transfers import Transfer, Transfers, thread_initializer
from pruneforge.interfaces.adapter import Block
from pruneforge.profile import Profile


class Residency(Protocol):
    """Brings parts of a model to the device that computes, and lets them go.

    Attributes:
        device: Where computation happens.
    """

    device: torch.device

    def stem_and_head(self) -> AbstractContextManager[None]:
        """Hold everything outside the blocks on `device` within the context."""

    def visit(self, block: Block, pruned: bool = False) -> AbstractContextManager[None]:
        """Hold one block on `device` within the context.

        Args:
            block: The block.
            pruned: Whether to bring in what an earlier process of the same run made of it; a residency whose
                runs cannot be resumed is never asked to.
        """


class InMemory:
    """The whole model stays in memory; a visited part is moved to the device and back."""

    def __init__(self, model: nn.Module, blocks: list[Block], device: torch.device) -> None:
        self.device = device
        inside = {id(module) for block in blocks for module in block.module.modules()}
        self._outside = [module for module in model.modules() if id(module) not in inside]

    @contextmanager
    def stem_and_head(self) -> Iterator[None]:
        """Hold everything outside the blocks on the device."""
        with self._moved(self._outside):
            yield

    @contextmanager
    def visit(self, block: Block, pruned: bool = False) -> Iterator[None]:
        """Hold one block on the device; what changes in it is kept."""
        with self._moved(list(block.module.modules())):
            yield

    @contextmanager
    def _moved(self, modules: list[nn.Module]) -> Iterator[None]:
        homes: list[tuple[nn.Module, str, torch.device]] = []
        for module in modules:
            for name, tensor in _own_tensors(module):
                if tensor.device != self.device:
                    homes.append((module, name, tensor.device))
                    _move(module, name, self.device)
        try:
            yield
        finally:
            for module, name, home in homes:
                _move(module, name, home)


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _move(module: nn.Module, name: str, device: torch.device) -> None:
    # Through `.data`, so that a tied parameter stays one object.
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.data = parameter.data.to(device)
    else:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = buffer.to(device)


Parts = list[tuple[nn.Parameter, Transfer]]


class Streamed:
    """Reads blocks from a checkpoint, the next one while one computes.

    Attributes:
        device: Where computation happens.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[Block],
        device: torch.device,
        checkpoint: Checkpoint,
        rewrite: Rewrite | None = None,
        profile: Profile | None = None,
    ) -> None:
        """Take a model whose parameters are vacant (`vacate`).

        Args:
            module: The model, on the CPU.
            blocks: Its blocks in the order they run.
            device: Where to bring them.
            checkpoint: Holds the dense weights.
            rewrite: Holds the pruned weights of finished blocks.
            profile: Where to note the time that reading takes.

        Raises:
            PruneForgeError: A tensor has another shape than the model's, or is not of a floating dtype.
        """
        self.device = device
        self._checkpoint = checkpoint
        self._rewrite = rewrite
        self._profile = profile or Profile()
        self._stored = stored_parameters(module, checkpoint)
        inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
        self._outside = [parameter for parameter in module.parameters() if id(parameter) not in inside]
        self._blocks = list(blocks)
        self._position = {block.name: index for index, block in enumerate(blocks)}
        self._buffers = {block.name: _buffers(block.module) for block in blocks}
        self._outside_buffers = [
            (part, name)
            for part, name in _buffers(module)
            if not any(part is other for found in self._buffers.values() for other, _ in found)
        ]
        self._reader = ThreadPoolExecutor(1, "pruneforge-reader", initializer=thread_initializer(device))
        self._transfers = Transfers(device)
        self._last = -1
        self._held: list[int] = []
        self._outside_held = 0
        self._ahead: tuple[int, bool, Future[Parts]] | None = None
        _load_buffers(module, checkpoint)

    @contextmanager
    def stem_and_head(self) -> Iterator[None]:
        """Hold everything outside the blocks on the device."""
        self._outside_held += 1
        try:
            with self._present(self._read(self._outside, False), self._outside_buffers):
                yield
        finally:
            self._outside_held -= 1

    @contextmanager
    def visit(self, block: Block, pruned: bool = False) -> Iterator[None]:
        """Hold one block on the device; `pruned`, as an earlier process left it."""
        index = self._position[block.name]
        parts = self._take(index, pruned)
        self._held.append(index)
        self._read_ahead(pruned)
        try:
            with self._present(parts, self._buffers[block.name]):
                yield
        finally:
            self._held.remove(index)
        self._read_ahead(pruned)

    def close(self) -> None:
        """End reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _take(self, index: int, pruned: bool) -> Parts:
        """Return a block that was read ahead, or read it now."""
        if self._ahead is None or self._ahead[:2] != (index, pruned):
            return self._read_block(index, pruned)
        reading, self._ahead = self._ahead[2], None
        return reading.result()

    def _read_ahead(self, pruned: bool) -> None:
        """Read what follows the block that is held, unless there is another or stem and head: no room for three."""
        if self._outside_held or len(self._held) != 1:
            return
        index = self._held[0]
        backwards = index < self._last or (index == self._last == len(self._blocks) - 1)
        following = index - 1 if backwards else index + 1
        self._last = index
        if self._ahead is not None and self._ahead[:2] == (following, pruned):
            return
        self._ahead = None  # a wrong guess is let go before the next is read
        if 0 <= following < len(self._blocks):
            task = self._reader.submit(self._read_block, following, pruned)
            self._ahead = (following, pruned, task)

    def _read_block(self, index: int, pruned: bool) -> Parts:
        with self._profile.stage("read", index, wait=False):  # for the device: reading ends when its own copies have
            return self._read(list(self._blocks[index].module.parameters()), pruned)

    def _read(self, parameters: Sequence[nn.Parameter], pruned: bool) -> Parts:
        parts: Parts = []
        for parameter in parameters:
            stored = self._stored[id(parameter)]
            if pruned and self._rewrite is not None and self._rewrite.changes(stored.name):
                value = self._rewrite.read(stored.name)
            else:
                value = self._checkpoint.read(stored, pinned=self._transfers.pinned)
            parts.append((parameter, self._transfers.to_device(value, parameter.dtype)))
        self._transfers.finish()
        return parts

    @contextmanager
    def _present(self, parts: Parts, buffers: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
        homes = []
        for module, name in buffers:
            value = module._buffers[name]
            assert value is not None
            homes.append((module, name, value))
            module._buffers[name] = value.to(self.device)
        present = [parameter for parameter, _ in parts]
        for parameter, transfer in parts:
            parameter.data = transfer.on_device()
        parts.clear()
        try:
            yield
        finally:
            for parameter in present:
                parameter.data = vacant(parameter.shape, parameter.dtype)
            for module, name, value in homes:
                module._buffers[name] = value


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(part, name) for part in module.modules() for name, value in part._buffers.items() if value is not None]


def _load_buffers(module: nn.Module, checkpoint: Checkpoint) -> None:
    for name, value in module.named_buffers():
        stored = checkpoint.tensors.get(name)
        if stored is not None and stored.shape == tuple(value.shape):
            value.copy_(checkpoint.read(stored))
