"""Per-sample gradients of the dense model, one block at a time from the last to the first.

A forward sweep keeps every block's input. The head gives the gradient of each sample's loss with
respect to the last hidden states; then each block is run again with autograd on, which gives its
layers' output gradients and hands the gradient on to the block before. Batches go through whole: a
sample's weight gradient is the product of that sample's own output gradients and inputs, so nothing
is averaged over the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pruneforge.engine.chain import Activations, Chain
from pruneforge.errors import PruneForgeError
from pruneforge.layer import Layer, accumulation_dtype
from pruneforge.progress import Progress
from pruneforge.statistics import GradientStatistic, Statistic

LayerGradients = dict[str, dict[type[Statistic], Statistic]]

LOSS_SCALE = {torch.float16: 2.0**12}
"""Keeps small gradients of half-precision models from vanishing; a power of two, taken out again exactly."""


def gradient_statistics(
    chain: Chain,
    activations: Sequence[Activations],
    kinds: Sequence[type[GradientStatistic]],
    progress: Progress,
) -> LayerGradients:
    """Return the gradient statistics of every layer, by layer name; `activations` are left as they are.

    Args:
        chain: The dense model.
        activations: Its captured batches, at the first block's input.
        kinds: The statistics to collect.
        progress: Where to show how far along the sweeps are.

    Raises:
        PruneForgeError: A loss or gradient is not finite, naming the layer.
    """
    inputs, outputs = _forward_sweep(chain, activations, progress)
    upstream = _head_gradients(chain, activations, outputs)
    found: LayerGradients = {}
    for index in progress.track(range(len(chain.blocks) - 1, -1, -1), "gradients", len(chain.blocks)):
        block = chain.blocks[index]
        with chain.residency.visit(block):
            for layer in block.layers:
                dtype, device = accumulation_dtype(layer.parameter.dtype), layer.parameter.device
                found[layer.name] = {kind: kind(layer.shape, dtype, device) for kind in kinds}
            for number, batch in enumerate(activations):
                upstream[number] = _block_gradients(chain, index, inputs[index][number], batch, upstream[number], found)
        inputs[index] = []
        for layer in block.layers:
            if not all(torch.isfinite(statistic.total).all() for statistic in found[layer.name].values()):
                raise PruneForgeError(f"non-finite gradients reach layer {layer.name!r}; run with --dtype float32")
    return found


@torch.no_grad()
def _forward_sweep(
    chain: Chain, activations: Sequence[Activations], progress: Progress
) -> tuple[list[list[Tensor]], list[Tensor]]:
    hidden = [batch.hidden for batch in activations]
    inputs = []
    for index in progress.track(range(len(chain.blocks)), "forward for gradients"):
        inputs.append(hidden)
        with chain.residency.visit(chain.blocks[index]):
            hidden = [chain.run_block(index, h, batch) for h, batch in zip(hidden, activations, strict=True)]
    return inputs, hidden


def _head_gradients(chain: Chain, activations: Sequence[Activations], outputs: list[Tensor]) -> list[Tensor]:
    gradients: list[Tensor] = []
    with chain.residency.stem_and_head(), torch.enable_grad():
        for number, batch in enumerate(activations):
            hidden = outputs[number].detach().requires_grad_()
            losses = chain.losses(hidden, batch.batch)
            if not torch.isfinite(losses).all():
                raise PruneForgeError(f"the loss of calibration batch {number} is not finite")
            gradients += torch.autograd.grad(losses.sum() * LOSS_SCALE.get(hidden.dtype, 1.0), hidden)
    return gradients


def _block_gradients(
    chain: Chain, index: int, hidden: Tensor, batch: Activations, upstream: Tensor, found: LayerGradients
) -> Tensor:
    layers = chain.blocks[index].layers
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad(), _taps(layers) as taps:
        output = chain.run_block(index, hidden, batch)
    passes = [(name, x, y) for name, pairs in taps.items() for x, y in pairs]
    downstream, *gradients = torch.autograd.grad(output, [hidden, *(y for _, _, y in passes)], upstream)
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (name, x, _), gradient in zip(passes, gradients, strict=True):
        by_layer[name].append((x, gradient))
    scale = LOSS_SCALE.get(hidden.dtype, 1.0)
    for layer in layers:
        for sample in range(batch.batch.size):
            weight_gradient = _sample_gradient(layer, by_layer[layer.name], sample) / scale
            for statistic in found[layer.name].values():
                assert isinstance(statistic, GradientStatistic)
                statistic.update(weight_gradient)
    return downstream


@contextmanager
def _taps(layers: Sequence[Layer]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Collect each layer's (input, output) of every time it runs within the context."""
    taps: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}

    def hook(name: str) -> Any:
        def tap(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            taps[name].append((args[0].detach(), output))

        return tap

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in layers]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _sample_gradient(layer: Layer, passes: list[tuple[Tensor, Tensor]], sample: int) -> Tensor:
    """Return the gradient [out, in] of one sample's loss with respect to the layer's weight."""
    dtype = accumulation_dtype(layer.parameter.dtype)
    total: Tensor | None = None
    for x, gradient in passes:
        inputs = layer.inputs(x)[sample].to(dtype)
        outputs = layer.outputs(gradient)[sample].to(dtype)
        product = outputs.T @ inputs
        total = product if total is None else total + product
    if total is None:
        raise PruneForgeError(f"no calibration batch reached layer {layer.name!r}")
    return total
