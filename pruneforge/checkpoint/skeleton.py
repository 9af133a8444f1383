"""Models without weights, and the locations of their weights in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.checkpoint.tensors import TensorLocation
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.numerics import all_finite


def make_skeleton(module: nn.Module) -> None:
    """Replace a model's parameters by placeholders on the CPU; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    before = list(module.parameters())  # keeps them alive, so that no id is reused
    for parameter in before:
        made[id(parameter)] = nn.Parameter(placeholder(parameter.shape, parameter.dtype), requires_grad=False)
    for part in module.modules():
        for name, present in part._parameters.items():
            if present is not None:
                part._parameters[name] = made[id(present)]


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of this shape that takes no memory.

    It is NaN, so that reading it by mistake shows in any result.
    """
    return torch.full((), torch.nan, dtype=dtype).expand(*shape)


def missing_parameters(module: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Return the parameters that a checkpoint does not hold under any of their names, each by its first name."""
    present: dict[int, bool] = {}  # by id: tied parameters have several names, and files usually hold one of them
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        present[id(parameter)] = present.get(id(parameter), False) or checkpoint.find(name) is not None
        names.setdefault(id(parameter), name)
    return [names[key] for key, in_checkpoint in present.items() if not in_checkpoint]


def parameter_locations(module: nn.Module, checkpoint: Checkpoint) -> dict[int, TensorLocation]:
    """Return the location of each parameter's tensor, by the parameter's id.

    Raises:
        PruneForgeError: A tensor differs from the parameter in shape, or is not floating-point.
    """
    locations: dict[int, TensorLocation] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        location = checkpoint.find(name)
        if location is None:
            continue
        if location.shape != tuple(parameter.shape):
            raise PruneForgeError(
                f"tensor {name!r} is {list(location.shape)} in the weights and {list(parameter.shape)} by config.json"
            )
        if not location.dtype.is_floating_point:
            raise PruneForgeError(f"tensor {name!r} is {location.dtype}, and weights must be floating-point numbers")
        locations.setdefault(id(parameter), location)
    return locations


def check_others(module: nn.Module, blocks: Sequence[Block], checkpoint: Checkpoint | None) -> None:
    """Raise if a parameter that is not pruned, such as a norm or an embedding, holds values that are not finite.

    Args:
        module: The model.
        blocks: Its blocks; their layers' weights are checked when they are pruned.
        checkpoint: Holds the weights if the module is a skeleton.

    Raises:
        PruneForgeError: Naming the first such parameter.
    """
    locations = parameter_locations(module, checkpoint) if checkpoint is not None else {}
    pruned = {id(layer.parameter) for block in blocks for layer in block.layers}
    for name, parameter in module.named_parameters():
        if id(parameter) in pruned or not parameter.is_floating_point():
            continue
        values: Iterable[Tensor] = [parameter.detach()]
        if checkpoint is not None and id(parameter) in locations:
            values = checkpoint.parts(locations[id(parameter)])
        if not all(map(all_finite, values)):
            raise PruneForgeError(f"{name!r} holds values that are not finite; the model is damaged")


def layer_locations(
    module: nn.Module, blocks: Sequence[Block], checkpoint: Checkpoint
) -> dict[str, tuple[TensorLocation, tuple[int, int]]]:
    """Return the location of each layer's weight and its shape (out, in), by layer name.

    Raises:
        PruneForgeError: See `parameter_locations`.
    """
    locations = parameter_locations(module, checkpoint)
    return {layer.name: (locations[id(layer.parameter)], layer.shape) for block in blocks for layer in block.layers}
