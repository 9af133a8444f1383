"""A prunable weight matrix, whatever module holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and scores over values of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Layer:
    """One prunable weight matrix in a block, here a `torch.nn.Linear`.

    A subclass that overrides `weight`, `write`, `inputs` and `outputs` gives metrics the same view of
    any other module whose forward pass is a matrix product.

    Attributes:
        name: Full name in the model, without `.weight`.
        module: The module that holds the weight.
    """

    name: str
    module: nn.Module = field(repr=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix [out, in], float32 or float64; read only."""
        data = self.parameter.detach()
        return data.to(accumulation_dtype(data.dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        out_features, in_features = self.parameter.shape
        return out_features, in_features

    def write(self, weight: Tensor, mask: Tensor) -> None:
        """Store `weight` [out, in] where `mask` keeps and zero elsewhere, in the parameter's dtype."""
        self.parameter.data.copy_(torch.where(mask, weight, torch.zeros((), device=weight.device)))

    def inputs(self, value: Tensor) -> Tensor:
        """View what the module received [batch, ..., in] as [batch, tokens, in]."""
        return _tokens(value)

    def outputs(self, value: Tensor) -> Tensor:
        """View what the module returned [batch, ..., out] as [batch, tokens, out]."""
        return _tokens(value)


def _tokens(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0], -1, value.shape[-1])
