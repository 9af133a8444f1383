"""Models without weights, and where in a checkpoint the weights of each layer are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pruneforge.checkpoint.shards import Checkpoint, Stored
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block


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
