"""A prunable weight matrix, whatever module holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pruneforge.errors import PruneForgeError


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and scores over values of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value is infinite or NaN, in one pass and without a temporary."""
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """Return what `all_finite` does as a tensor [] on the tensor's device, for which the host need not wait."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)


def first_false(flags: Sequence[Tensor]) -> int | None:
    """Return the place of the first flag [] that is false, if one is; the host waits once for all of them."""
    return next((place for place, flag in enumerate(torch.stack(list(flags)).tolist()) if not flag), None)


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Set to zero, in place, what `mask` prunes, and return the weight; both [out, in], or of as many values."""
    bits = weight.view(_BITS[weight.element_size()])  # as integers: exactly +0, and several times as fast
    bits.mul_(mask.view(weight.shape))
    return weight


@dataclass
class Layer:
    """One prunable weight matrix of a block, used as `torch.nn.functional.linear` uses it.

    A subclass that overrides `matrix`, `inputs` and `outputs` gives metrics the same view of a weight that
    another product uses.

    Attributes:
        name: Full name in the model, without `.weight`.
        parameter: The parameter that holds the weight.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)

    def matrix(self) -> Tensor:
        """Return a view of the parameter's data as a matrix [out, in]."""
        return self.parameter.data

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix [out, in], float32 or float64; read only."""
        data = self.matrix()
        return data.to(accumulation_dtype(data.dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        out_features, in_features = self.matrix().shape
        return out_features, in_features

    def write(self, mask: Tensor, weight: Tensor | None = None) -> None:
        """Set to zero what `mask` [out, in] prunes, of the weight as it is or of an updated `weight` [out, in]."""
        matrix = self.matrix()
        if weight is not None:
            matrix.copy_(weight)
        zeroed(matrix, mask)

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View what the weight was multiplied with [..., in] as [samples, tokens, in]."""
        return self._tokens(value, samples)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View what the product gave [..., out] as [samples, tokens, out]."""
        return self._tokens(value, samples)

    def _tokens(self, value: Tensor, samples: int) -> Tensor:
        # Windows and flattened tokens still stand sample by sample, so this is a view of the same order.
        tokens = value.shape[:-1].numel()
        if tokens % samples:
            raise PruneForgeError(f"layer {self.name!r} sees {tokens} tokens, no whole number for {samples} samples")
        return value.reshape(samples, -1, value.shape[-1])


class PointwiseConvLayer(Layer):
    """The weight [out, in, 1, 1] of a 1x1 convolution, whose tokens are the positions of the image."""

    def matrix(self) -> Tensor:
        """Return a view of the parameter's data as a matrix [out, in]."""
        return self.parameter.data.flatten(1)

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View an image [samples, in, height, width] as [samples, tokens, in]."""
        return value.flatten(2).transpose(1, 2)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View an image [samples, out, height, width] as [samples, tokens, out]."""
        return value.flatten(2).transpose(1, 2)


def find_layers(module: nn.Module, prefix: str) -> list[Layer]:
    """Return the layers of a block: every linear module and every 1x1 convolution of one group.

    Args:
        module: The block.
        prefix: Its full name in the model.
    """
    layers: list[Layer] = []
    for name, part in module.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if isinstance(part, nn.Linear):
            layers.append(Layer(full, cast(nn.Parameter, part.weight)))
        elif isinstance(part, nn.Conv2d) and part.groups == 1 and set(part.kernel_size + part.stride) == {1}:
            layers.append(PointwiseConvLayer(full, cast(nn.Parameter, part.weight)))
    return layers


class WeightUses(TorchFunctionMode):
    """Reports, within its context, every product of an input with one of some layers' weights.

    Weights are recognised by identity where the product happens. Hooks on modules would miss code that
    takes a module's weight and calls the function itself.
    """

    _PRODUCTS = frozenset({F.linear, F.conv2d, torch.conv2d})

    def __init__(
        self,
        layers: Sequence[Layer],
        before: Callable[[Layer, Tensor], None] | None = None,
        after: Callable[[Layer, Tensor, Tensor], None] | None = None,
    ) -> None:
        """Report to `before(layer, input)` and `after(layer, input, output)`."""
        super().__init__()
        self._layers = {id(layer.parameter): layer for layer in layers}
        self._before = before
        self._after = after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._PRODUCTS:
            return func(*args, **kwargs)
        layer = self._layers.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
        value = args[0] if args else kwargs["input"]
        if layer is not None and self._before:
            self._before(layer, value)
        output = func(*args, **kwargs)
        if layer is not None and self._after:
            self._after(layer, value, output)
        return output
