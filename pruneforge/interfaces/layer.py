"""A prunable weight matrix, whatever module holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from pruneforge.errors import PruneForgeError
from pruneforge.numerics import accumulation_dtype, zeroed


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
