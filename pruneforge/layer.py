"""A prunable weight matrix, whatever module holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pruneforge.errors import PruneForgeError


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
        out_features, in_features = self.weight.shape
        return out_features, in_features

    def write(self, weight: Tensor, mask: Tensor) -> None:
        """Store `weight` [out, in] where `mask` keeps and zero elsewhere, in the parameter's dtype."""
        self.parameter.data.copy_(torch.where(mask, weight, torch.zeros((), device=weight.device)))

    def inputs(self, value: Tensor, samples: int) -> Tensor:
        """View what the module received [..., in] as [samples, tokens, in]."""
        return self._tokens(value, samples)

    def outputs(self, value: Tensor, samples: int) -> Tensor:
        """View what the module returned [..., out] as [samples, tokens, out]."""
        return self._tokens(value, samples)

    def _tokens(self, value: Tensor, samples: int) -> Tensor:
        # Windows and flattened tokens still stand sample by sample, so this is a view of the same order.
        tokens = value.shape[:-1].numel()
        if tokens % samples:
            raise PruneForgeError(
                f"layer {self.name!r} sees {tokens} tokens, which do not divide into {samples} samples"
            )
        return value.reshape(samples, -1, value.shape[-1])
