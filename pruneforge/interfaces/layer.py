"""Prunable weight matrices, independent of the module that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.products import CONVOLUTIONS, MATRIX_PRODUCTS, Product
from pruneforge.numerics import accumulation_dtype, zeroed


@dataclass
class Layer:
    """One prunable weight matrix of a block, multiplied by `torch.nn.functional.linear` or another matrix product.

    For the weight of another product, or one that lies in its parameter in another way, a subclass sets `products` and
    overrides `view`, `inputs` and `outputs` as far as they differ; metrics then see the same shapes.

    Attributes:
        name: Full name in the model, without `.weight`.
        parameter: The parameter that holds the weight, alone or among others.
        routed: Whether the model chooses the tokens that the layer receives, as for an expert. They come without their
            samples, and there may be none; then the layer stays dense.
        products: The functions that may multiply by the weight.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    routed: bool = field(default=False, kw_only=True)
    products: ClassVar[tuple[Product, ...]] = MATRIX_PRODUCTS

    def view(self, tensor: Tensor) -> Tensor:
        """View the weight in a tensor that lies as the parameter does, a checkpoint's or a gradient, as [out, in].

        It must be a view: masks and updated weights are written to it.
        """
        return tensor

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

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.matrix().numel()

    def write(self, mask: Tensor, weight: Tensor | None = None) -> None:
        """Take over an updated `weight` [out, in], if given, and zero what `mask` prunes, boolean [out, in]."""
        matrix = self.matrix()
        if weight is not None:
            matrix.copy_(weight)
        zeroed(matrix, mask)

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View the input of the product [..., in] as [samples, tokens, in]; [1, tokens, in] if the layer is routed.

        Raises:
            PruneForgeError: The tokens cannot be divided evenly among the samples.
        """
        return self._tokens(value, samples)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View the output of the product [..., out] as [samples, tokens, out]; [1, tokens, out] if it is routed.

        Raises:
            PruneForgeError: The tokens cannot be divided evenly among the samples.
        """
        return self._tokens(value, samples)

    def _tokens(self, value: Tensor, samples: int) -> Tensor:
        # Windows and flattened tokens are still ordered by sample, so a reshape separates the samples.
        tokens = value.shape[:-1].numel()
        if self.routed:
            samples = 1
        if tokens % samples:
            raise PruneForgeError(
                f"layer {self.name!r} receives {tokens} tokens, which is not a multiple of {samples} samples"
            )
        return value.reshape(samples, -1, value.shape[-1])


class PointwiseConvLayer(Layer):
    """The weight [out, in, 1, 1] of a 1x1 convolution; its tokens are the positions of the image."""

    products = CONVOLUTIONS

    def view(self, tensor: Tensor) -> Tensor:
        """View a tensor [out, in, 1, 1] as a matrix [out, in]."""
        return tensor.flatten(1)

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View an image [samples, in, height, width] as [samples, tokens, in]."""
        return value.flatten(2).transpose(1, 2)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View an image [samples, out, height, width] as [samples, tokens, out]."""
        return value.flatten(2).transpose(1, 2)


class TransposedLayer(Layer):
    """A weight stored as [in, out]."""

    def view(self, tensor: Tensor) -> Tensor:
        """View a tensor [in, out] as a matrix [out, in]."""
        return tensor.T


@dataclass
class SlicedLayer(Layer):
    """One slice of a parameter [slices, out, in], such as one expert's weight among those of all.

    Attributes:
        index: Position of the slice.
    """

    index: int

    def view(self, tensor: Tensor) -> Tensor:
        """View one slice of a tensor [slices, out, in]."""
        return tensor[self.index]


def find_layers(
    module: nn.Module, prefix: str, others: Mapping[type[nn.Module], type[Layer]] | None = None
) -> list[Layer]:
    """Return the layers of a block: its linear modules and its 1x1 convolutions with one group.

    Args:
        module: The block.
        prefix: The block's full name in the model.
        others: Further classes of modules, with the class of the layer that their `weight` makes.
    """
    layers: list[Layer] = []
    for name, part in module.named_modules():
        kind = _layer_class(part, others or {})
        if kind is not None:
            layers.append(kind(f"{prefix}.{name}" if name else prefix, part.get_parameter("weight")))
    return layers


def _layer_class(module: nn.Module, others: Mapping[type[nn.Module], type[Layer]]) -> type[Layer] | None:
    """Return the class of the layer that a module's weight makes, or `None`."""
    if isinstance(module, nn.Linear):
        return Layer
    if isinstance(module, nn.Conv2d) and module.groups == 1 and set(module.kernel_size + module.stride) == {1}:
        return PointwiseConvLayer
    return next((kind for known, kind in others.items() if isinstance(module, known)), None)
