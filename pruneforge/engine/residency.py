"""Load the parts of a model that a run needs, and release them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.checkpoint.skeleton import parameter_locations, placeholder
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.engine.transfers import Transfer, Transfers, thread_initializer
from pruneforge.interfaces.adapter import Block
from pruneforge.profile import Profile


class Residency(Protocol):
    """Loads parts of a model onto the device, and releases them.

    Attributes:
        device: Where computation happens.
    """

    device: torch.device

    def stem_and_head(self) -> AbstractContextManager[None]:
        """Keep everything outside the blocks on `device` within the context."""

    def visit(self, block: Block, pruned: bool = False) -> AbstractContextManager[None]:
        """Keep one block on `device` within the context.

        Args:
            block: The block.
            pruned: Load the block as an earlier process of the same run pruned it. Only resumed runs ask for it.
        """


class InMemory:
    """Keeps the whole model in memory, and moves visited parts to the device and back."""

    def __init__(self, model: nn.Module, blocks: list[Block], device: torch.device) -> None:
        self.device = device
        inside = {id(module) for block in blocks for module in block.module.modules()}
        self._outside = [module for module in model.modules() if id(module) not in inside]

    @contextmanager
    def stem_and_head(self) -> Iterator[None]:
        """Keep everything outside the blocks on the device within the context."""
        with moved(self._outside, self.device):
            yield

    @contextmanager
    def visit(self, block: Block, pruned: bool = False) -> Iterator[None]:
        """Keep one block on the device within the context; changes to it are moved back with it."""
        with moved(list(block.module.modules()), self.device):
            yield


@contextmanager
def moved(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules' own tensors to a device within the context."""
    homes: list[tuple[nn.Module, str, torch.device]] = []
    for module in modules:
        for name, tensor in _own_tensors(module):
            if tensor.device != device:
                homes.append((module, name, tensor.device))
                _move(module, name, device)
    try:
        yield
    finally:
        for module, name, home in homes:
            _move(module, name, home)


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _move(module: nn.Module, name: str, device: torch.device) -> None:
    # Assigned to `.data`, so that the parameter stays the same object: ties and layers refer to it.
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.data = parameter.data.to(device)
    else:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = buffer.to(device)


Parts = list[tuple[nn.Parameter, Transfer]]


class Streamed:
    """Reads blocks from a checkpoint, each one while the block before it computes.

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
        """Start reading for a model without weights, as `make_skeleton` leaves it.

        Args:
            module: The model, on the CPU.
            blocks: Its blocks in the order they run.
            device: Where to load them.
            checkpoint: Holds the dense weights.
            rewrite: Holds the pruned weights of finished blocks.
            profile: Records the time that reading takes.

        Raises:
            PruneForgeError: A tensor differs from the model's in shape, or is not floating-point.
        """
        self.device = device
        self._checkpoint = checkpoint
        self._rewrite = rewrite
        self._profile = profile or Profile()
        self._locations = parameter_locations(module, checkpoint)
        inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
        self._outside = [parameter for parameter in module.parameters() if id(parameter) not in inside]
        self._blocks = list(blocks)
        self._position = {block.name: index for index, block in enumerate(blocks)}
        self._buffers = {block.name: _buffers(block.module) for block in blocks}
        self._outside_buffers = [
            (part, name)
            for part, name in _buffers(module)
            if not any(part is other for buffers in self._buffers.values() for other, _ in buffers)
        ]
        self._reader = ThreadPoolExecutor(1, "pruneforge-reader", initializer=thread_initializer(device))
        self._transfers = Transfers(device)
        self._last = -1  # the block visited before, which tells the direction of the sweep
        self._held: list[int] = []  # blocks being visited
        self._outside_held = 0  # nested visits of stem and head
        self._ahead: tuple[int, bool, Future[Parts]] | None = None  # block read ahead, whether pruned, its weights
        _load_buffers(module, checkpoint)

    @contextmanager
    def stem_and_head(self) -> Iterator[None]:
        """Keep everything outside the blocks on the device within the context."""
        self._outside_held += 1
        try:
            with self._present(self._read(self._outside, False), self._outside_buffers):
                yield
        finally:
            self._outside_held -= 1

    @contextmanager
    def visit(self, block: Block, pruned: bool = False) -> Iterator[None]:
        """Keep one block on the device within the context; see `Residency.visit`."""
        index = self._position[block.name]
        parts = self._take(index, pruned)
        self._held.append(index)
        self._read_ahead(pruned)
        try:
            with self._present(parts, self._buffers[block.name]):
                yield
        finally:
            self._held.remove(index)
        self._read_ahead(pruned)  # of two blocks that were held, one is left, and there is room for the next

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _take(self, index: int, pruned: bool) -> Parts:
        """Return the weights of a block, read ahead or now."""
        if self._ahead is None or self._ahead[:2] != (index, pruned):
            return self._read_block(index, pruned)
        reading, self._ahead = self._ahead[2], None
        return reading.result()

    def _read_ahead(self, pruned: bool) -> None:
        """Start reading the block after the held one, unless a second block or stem and head take its room."""
        if self._outside_held or len(self._held) != 1:
            return
        index = self._held[0]
        # Gradients visit blocks from the last to the first, starting where the forward sweep before them ended.
        backwards = index < self._last or (index == self._last == len(self._blocks) - 1)
        following = index - 1 if backwards else index + 1
        self._last = index
        if self._ahead is not None and self._ahead[:2] == (following, pruned):
            return
        self._ahead = None  # free a wrong guess before the next block is read
        if 0 <= following < len(self._blocks):
            task = self._reader.submit(self._read_block, following, pruned)
            self._ahead = (following, pruned, task)

    def _read_block(self, index: int, pruned: bool) -> Parts:
        # Not waiting for the current stream: the copies have a stream of their own, which `_read` waits for.
        with self._profile.stage("read", index, wait=False):
            return self._read(list(self._blocks[index].module.parameters()), pruned)

    def _read(self, parameters: Sequence[nn.Parameter], pruned: bool) -> Parts:
        """Read parameters and copy them to the device; return once the copies are complete."""
        parts: Parts = []
        for parameter in parameters:
            location = self._locations[id(parameter)]
            if pruned and self._rewrite is not None and self._rewrite.changes(location.name):
                value = self._rewrite.read(location.name)
            else:
                value = self._checkpoint.read(location, pinned=self._transfers.pinned)
            parts.append((parameter, self._transfers.to_device(value, parameter.dtype)))
        self._transfers.finish()
        return parts

    @contextmanager
    def _present(self, parts: Parts, buffers: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
        """Put weights and buffers into the model within the context, and placeholders afterwards."""
        homes = []
        for module, name in buffers:
            value = module._buffers[name]
            assert value is not None
            homes.append((module, name, value))
            module._buffers[name] = value.to(self.device)
        present = [parameter for parameter, _ in parts]
        for parameter, transfer in parts:
            parameter.data = transfer.on_device()
        parts.clear()  # the caller holds this list too; its tensors must not outlive the visit
        try:
            yield
        finally:
            for parameter in present:
                parameter.data = placeholder(parameter.shape, parameter.dtype)
            for module, name, value in homes:
                module._buffers[name] = value


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return a module's buffers, as (owning module, name)."""
    return [(part, name) for part in module.modules() for name, value in part._buffers.items() if value is not None]


def _load_buffers(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the buffers that a checkpoint holds; others keep the value that the model computed."""
    for name, value in module.named_buffers():
        location = checkpoint.find(name)
        if location is not None and location.shape == tuple(value.shape):
            value.copy_(checkpoint.read(location))
