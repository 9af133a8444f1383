"""Where a model's weights are while a run visits its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from pruneforge.adapter import Block


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
