"""Prunable weight matrices, independent of the module that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from pruneforge.errors import PruneForgeError
from pruneforge.numerics import accumulation_dtype, zeroed


@dataclass
class Layer:
    """One prunable weight matrix of a block, multiplied as in `torch.nn.functional.linear`.

    For the weight of another product, a subclass overrides `matrix`, `inputs` and `outputs`; metrics then see the same
    shapes.

    Attributes:
        name: Full name in the model, without `.weight`.
        parameter: The parameter that holds the weight.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)

    def view(self, value: Tensor) -> Tensor:
        """View a tensor that lies as the parameter does, such as its gradient, as a matrix [out, in]."""
        return value

    def matrix(self) -> Tensor:
        """Return a view of the parameter as a matrix [out, in], without gradients."""
        return self.view(self.parameter.detach())  # not `.data`, whose changes in place torch does not count

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
        """Take over an updated `weight` [out, in], if given, and zero what `mask` prunes, boolean [out, in]."""
        matrix = self.matrix()
        if weight is not None:
            matrix.copy_(weight)
        zeroed(matrix, mask)

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View the input of the product [..., in] as [samples, tokens, in].

        Raises:
            PruneForgeError: The tokens cannot be divided evenly among the samples.
        """
        return self._tokens(value, samples)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View the output of the product [..., out] as [samples, tokens, out].

        Raises:
            PruneForgeError: The tokens cannot be divided evenly among the samples.
        """
        return self._tokens(value, samples)

    def _tokens(self, value: Tensor, samples: int) -> Tensor:
        # Windows and flattened tokens are still ordered by sample, so a reshape separates the samples.
        tokens = value.shape[:-1].numel()
        if tokens % samples:
            raise PruneForgeError(
                f"layer {self.name!r} receives {tokens} tokens, which is not a multiple of {samples} samples"
            )
        return value.reshape(samples, -1, value.shape[-1])


class PointwiseConvLayer(Layer):
    """The weight [out, in, 1, 1] of a 1x1 convolution; its tokens are the positions of the image."""

    def view(self, value: Tensor) -> Tensor:
        """View a tensor [out, in, 1, 1] as a matrix [out, in]."""
        return value.flatten(1)

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View an image [samples, in, height, width] as [samples, tokens, in]."""
        return value.flatten(2).transpose(1, 2)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View an image [samples, out, height, width] as [samples, tokens, out]."""
        return value.flatten(2).transpose(1, 2)


def find_layers(module: nn.Module, prefix: str) -> list[Layer]:
    """Return the layers of a block: its linear modules and its 1x1 convolutions with one group.

    Args:
        module: The block.
        prefix: The block's full name in the model.
    """
    layers: list[Layer] = []
    for name, part in module.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if isinstance(part, nn.Linear):
            layers.append(Layer(full, cast(nn.Parameter, part.weight)))
        elif isinstance(part, nn.Conv2d) and part.groups == 1 and set(part.kernel_size + part.stride) == {1}:
            layers.append(PointwiseConvLayer(full, cast(nn.Parameter, part.weight)))
    return layers
