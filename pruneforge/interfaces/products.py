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
        transposed: Whether it takes the weight as [in, out] and not as [out, in].
    """

    function: Callable[..., Any]
    input: tuple[int, str]
    weight: tuple[int, str]
    transposed: bool = False

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the input and the weight of a call."""
        return _argument(self.input, args, kwargs), _argument(self.weight, args, kwargs)


def _argument(place: tuple[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    position, name = place
    return args[position] if position < len(args) else kwargs[name]


MATRIX_PRODUCTS = (
    Product(F.linear, (0, "input"), (1, "weight")),
    Product(torch.addmm, (1, "mat1"), (2, "mat2"), transposed=True),
    Product(torch.mm, (0, "input"), (1, "mat2"), transposed=True),
    Product(torch.matmul, (0, "input"), (1, "other"), transposed=True),
    Product(Tensor.matmul, (0, "self"), (1, "other"), transposed=True),  # `@` too
)
"""The products of a matrix, whichever way it lies: `x @ weight.T` is one of them."""

CONVOLUTIONS = (Product(F.conv2d, (0, "input"), (1, "weight")),)
"""The products of a convolution's weight."""
