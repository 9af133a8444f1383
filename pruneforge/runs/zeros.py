"""Keep pruned weights zero while a model is fine-tuned, and when adapters are merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from pruneforge.checkpoint.masks import load_masks
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.layer import Layer
from pruneforge.numerics import zeroed
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.loading import load_model

Masks = str | Path | Mapping[str, Tensor]
"""Masks, boolean [out, in] by layer name, or the output of a pruning run, or its file of masks."""


class KeptZeros:
    """The pruned weights of a model, which stay zero until `remove`, or the end of a `with` block.

    Gradients of pruned weights are zeroed as soon as they are there, so that they count neither in the norm that
    clipping looks at nor in an optimizer's moments. After each step of a torch optimizer that has the weights,
    whichever it is, they are zeroed again: momentum from before and weight decay do not move them. Where something else
    writes weights, call `enforce`.
    """

    def __init__(self, layers: Mapping[str, Layer], masks: Mapping[str, Tensor]) -> None:
        """Begin to keep zeros; each mask is held on the device of its layer."""
        self._pairs = [(layer, masks[name].to(layer.parameter.device)) for name, layer in layers.items()]
        self._parameters = {id(layer.parameter): layer.parameter for layer, _ in self._pairs}
        self._hooks: list[Any] = [register_optimizer_step_post_hook(self._stepped)]
        for key, parameter in self._parameters.items():
            if parameter.requires_grad:
                own = [(layer, mask) for layer, mask in self._pairs if id(layer.parameter) == key]
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_zero_gradient, own)))

    @torch.no_grad()
    def enforce(self) -> None:
        """Set all pruned weights to zero."""
        for layer, mask in self._pairs:
            zeroed(layer.matrix(), mask.to(layer.parameter.device))

    def lost(self) -> dict[str, int]:
        """Return how many pruned weights are not zero, by layer name, for the layers that have any."""
        return _lost(self._pairs)

    def remove(self) -> None:
        """Stop keeping zeros."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None:
            _check(self._pairs)

    def _stepped(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(each) in self._parameters for group in optimizer.param_groups for each in group["params"]):
            self.enforce()


def keep_zeros(model: nn.Module, masks: Masks) -> KeptZeros:
    """Keep the pruned weights of a model zero while it is trained, with any loop and any torch optimizer.

    Args:
        model: The pruned model, on the device that it is trained on.
        masks: Boolean [out, in] by layer name, as `pruneforge.load` gives them, or the output of a pruning run.

    Returns:
        A handle, which is a context; without `with`, call its `remove()` after training.

    Raises:
        PruneForgeError: Masks do not fit the model's layers, or a pruned weight is not zero already.
    """
    pairs, found = _paired(model, masks)
    _check(pairs)
    return KeptZeros({layer.name: layer for layer, _ in pairs}, found)


def check_zeros(model: nn.Module, masks: Masks) -> None:
    """Check that all pruned weights of a model are zero, such as after merging an adapter.

    Args:
        model: The model.
        masks: As for `keep_zeros`.

    Raises:
        PruneForgeError: Masks do not fit the model's layers, or pruned weights are not zero; it says how many.
    """
    _check(_paired(model, masks)[0])


def merge_under_masks(model: Any, masks: Masks) -> nn.Module:
    """Merge the adapters of a PEFT model into its pruned weights, without losing zeros.

    An adapter such as LoRA adds a dense `s B A` to a weight. What it adds to pruned weights is left out:
    `W + s (B A) * M`.
    Unless training multiplied the adapter by the mask too, the merged model then differs from the one that was trained;
    measure it again.

    Args:
        model: The PEFT model, which is used up.
        masks: As for `keep_zeros`.

    Returns:
        The model without adapters.

    Raises:
        PruneForgeError: The model has no `merge_and_unload`, or masks do not fit its layers.
    """
    if not hasattr(model, "merge_and_unload"):
        raise PruneForgeError(f"{type(model).__name__} has no adapters to merge; pass the PEFT model")
    merged: nn.Module = model.merge_and_unload()
    with torch.no_grad():
        for layer, mask in _paired(merged, masks)[0]:
            zeroed(layer.matrix(), mask.to(layer.parameter.device))
    return merged


def _paired(model: nn.Module, masks: Masks) -> tuple[list[tuple[Layer, Tensor]], Mapping[str, Tensor]]:
    """Return each layer that has a mask, with it, and the masks by name.

    Raises:
        PruneForgeError: A mask has no layer in the model, or another shape.
    """
    found = load_masks(Path(masks)) if isinstance(masks, str | Path) else masks
    loaded = load_model(model, "auto", None, loaded_plugins().registry)
    layers = {layer.name: layer for block in loaded.adapter.blocks(model) for layer in block.layers}
    for name, mask in found.items():
        if name not in layers:
            raise PruneForgeError(f"the model has no layer {name!r}, for which there is a mask; are these its masks?")
        if tuple(mask.shape) != layers[name].shape or mask.dtype != torch.bool:
            raise PruneForgeError(
                f"the mask of layer {name!r} is {mask.dtype} {tuple(mask.shape)}; it must be boolean "
                f"{layers[name].shape}"
            )
    return [(layers[name], mask) for name, mask in found.items()], found


def _lost(pairs: list[tuple[Layer, Tensor]]) -> dict[str, int]:
    counts = {
        layer.name: int(layer.matrix().masked_fill(mask.to(layer.parameter.device), 0).count_nonzero())
        for layer, mask in pairs
    }
    return {name: count for name, count in counts.items() if count}


def _check(pairs: list[tuple[Layer, Tensor]]) -> None:
    """Raise if a pruned weight is not zero."""
    lost = _lost(pairs)
    if lost:
        total = sum(mask.numel() - int(mask.count_nonzero()) for _, mask in pairs)
        raise PruneForgeError(
            f"{sum(lost.values())} of {total} pruned weights are not zero, in {len(lost)} layers such as "
            f"{next(iter(lost))!r}; prune the model with `pruneforge.apply`, or merge adapters with "
            "`pruneforge.merge_under_masks`"
        )


@torch.no_grad()
def _zero_gradient(pairs: list[tuple[Layer, Tensor]], parameter: Tensor) -> None:
    if parameter.grad is not None:
        for layer, mask in pairs:
            zeroed(layer.view(parameter.grad), mask.to(parameter.device))
