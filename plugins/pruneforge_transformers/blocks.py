"""Find the blocks of a transformers model by the names of their layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from pruneforge import Block, Layer, TransposedLayer, find_layers

Shapes = Sequence[Sequence[str]]
"""Names of a block's layers, for each shape that a block may have; a name may come several times."""


def blocks_of(module: Any, shapes: Shapes) -> list[Block]:
    """Return the blocks of the first list beside the embeddings of tokens whose blocks all have one of the shapes.

    Without such a list, those of the first list, which error messages then describe; without any, none.
    """
    lists = _lists_of_text_model(module)
    fitting = (blocks for blocks in lists if all(not_of_shape(block, shapes) is None for block in blocks))
    return next(fitting, lists[0] if lists else [])


def not_of_shape(block: Block, shapes: Shapes) -> str | None:
    """Return how a block differs from all shapes, or `None` if it has one of them."""
    kind = type(block.module).__name__
    names = [layer.name.rpartition(".")[2] for layer in block.layers]
    if not any(sorted(names) == sorted(shape) for shape in shapes):
        return f"({kind}) has linear layers {', '.join(names) or 'none'}"
    inside = {id(layer.parameter) for layer in block.layers}
    for name, parameter in block.module.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in inside:
            return f"({kind}) has a weight {name} {list(parameter.shape)} that is not in a linear layer"
    return None


def _lists_of_text_model(module: Any) -> list[list[Block]]:
    """Return the lists of blocks in the smallest part of a model that holds the embeddings of tokens and any list.

    A model of several modalities has lists for images too, whose blocks may have the same shape.
    """
    embeddings = module.get_input_embeddings()
    holding = [
        (name, part)
        for name, part in module.named_modules()
        if part is not embeddings and any(inner is embeddings for inner in part.modules())
    ]
    for name, part in reversed(holding):  # from the innermost
        lists = list(_lists(part, name))
        if lists:
            return lists
    return []


def _lists(module: nn.Module, prefix: str) -> Iterator[list[Block]]:
    """Yield the items of each module list as blocks; `prefix` stands before their names."""
    for of_list, part in module.named_modules(prefix=prefix):
        if isinstance(part, nn.ModuleList) and len(part):
            named = [(f"{of_list}.{name}", block) for name, block in part.named_children()]
            yield [Block(name, block, tuple(_layers(block, name))) for name, block in named]


def _layers(block: nn.Module, name: str) -> list[Layer]:
    return find_layers(block, name, {Conv1D: TransposedLayer})
