"""The functions that multiply an input by a layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Product:
    """A function that multiplies an input by a weight, and where both are among its arguments.

    Attributes:
        function: The function, as torch passes it to `__torch_function__`.
        input: Position and name of the input.
        weight: Position and name of the weight.
    """

    function: Callable[..., Any]
    input: tuple[int, str]
    weight: tuple[int, str]

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the input and the weight of a call."""
        return _argument(self.input, args, kwargs), _argument(self.weight, args, kwargs)


def _argument(place: tuple[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    position, name = place
    value: Tensor = args[position] if position < len(args) else kwargs[name]
    return value


LINEAR = Product(F.linear, (0, "input"), (1, "weight"))
CONVOLUTION = Product(F.conv2d, (0, "input"), (1, "weight"))
ADDED_PRODUCT = Product(torch.addmm, (1, "mat1"), (2, "mat2"))
"""bias + input @ weight, with the weight as [in, out]."""
