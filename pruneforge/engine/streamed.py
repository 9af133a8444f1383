"""A model whose weights stay on disk; a visited part is read, and let go afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruneforge.adapter import Block
from pruneforge.checkpoint.rewrite import Rewrite
from pruneforge.checkpoint.shards import Checkpoint, Stored
from pruneforge.engine.transfers import Transfer, Transfers, thread_initializer
from pruneforge.errors import PruneForgeError
from pruneforge.profile import Profile

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


def vacate(module: nn.Module) -> None:
    """Replace a model's parameters by vacant ones on the CPU; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    before = list(module.parameters())  # held, so that no id is given twice
    for parameter in before:
        made[id(parameter)] = nn.Parameter(vacant(parameter.shape, parameter.dtype), requires_grad=False)
    for part in module.modules():
        for name, present in part._parameters.items():
            if present is not None:
                part._parameters[name] = made[id(present)]


def vacant(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of this shape that takes no memory and is NaN wherever it is read by mistake."""
    return torch.full((), torch.nan, dtype=dtype).expand(*shape)


def lacking(module: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Return a name of each parameter that a checkpoint holds under none of its names."""
    there: dict[int, bool] = {}
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        there[id(parameter)] = there.get(id(parameter), False) or name in checkpoint.tensors
        names.setdefault(id(parameter), name)
    return [names[key] for key, found in there.items() if not found]


def stored_parameters(module: nn.Module, checkpoint: Checkpoint) -> dict[int, Stored]:
    """Return where each parameter's weights stand, by the parameter's id.

    Raises:
        PruneForgeError: A tensor has another shape than the parameter, or is not of a floating dtype.
    """
    found: dict[int, Stored] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored = checkpoint.tensors.get(name)
        if stored is None:
            continue
        if stored.shape != tuple(parameter.shape):
            raise PruneForgeError(
                f"tensor {name!r} is {list(stored.shape)} in the weights and {list(parameter.shape)} by config.json"
            )
        if not stored.dtype.is_floating_point:
            raise PruneForgeError(f"tensor {name!r} is {stored.dtype}, and weights must be floating-point numbers")
        found.setdefault(id(parameter), stored)
    return found


def stored_layers(
    module: nn.Module, blocks: Sequence[Block], checkpoint: Checkpoint
) -> dict[str, tuple[Stored, tuple[int, int]]]:
    """Return where each layer's weight stands, and its shape as a matrix, by layer name."""
    stored = stored_parameters(module, checkpoint)
    return {layer.name: (stored[id(layer.parameter)], layer.shape) for block in blocks for layer in block.layers}


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(part, name) for part in module.modules() for name, value in part._buffers.items() if value is not None]


def _load_buffers(module: nn.Module, checkpoint: Checkpoint) -> None:
    for name, value in module.named_buffers():
        stored = checkpoint.tensors.get(name)
        if stored is not None and stored.shape == tuple(value.shape):
            value.copy_(checkpoint.read(stored))
