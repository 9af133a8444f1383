"""Per-sample gradients of the dense model, one block at a time from the last to the first.

A forward sweep keeps every block's input. The head gives the gradient of each sample's loss with
respect to the last hidden states; then each block is run again with autograd on, which gives its
layers' output gradients and hands the gradient on to the block before. Batches go through whole: a
sample's weight gradient is the product of that sample's own output gradients and inputs, so nothing
is averaged over the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pruneforge.engine.calibrate import InputRecorder, check_weights
from pruneforge.engine.chain import Activations, Chain
from pruneforge.errors import PruneForgeError
from pruneforge.layer import Layer, WeightUses, accumulation_dtype
from pruneforge.progress import Progress
from pruneforge.statistics import ColumnSquares, GradientStatistic, Statistic

LayerGradients = dict[str, dict[type[Statistic], Statistic]]

HOST = torch.device("cpu")
"""Where block inputs and finished statistics wait: for all blocks together they would not fit a device."""

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
    scale = LOSS_SCALE.get(activations[0].hidden.dtype, 1.0)
    inputs, outputs = _forward_sweep(chain, activations, progress)
    upstream = _head_gradients(chain, activations, outputs, scale)
    found: LayerGradients = {}
    for index in progress.track(range(len(chain.blocks) - 1, -1, -1), "gradients", len(chain.blocks)):
        block = chain.blocks[index]
        with chain.residency.visit(block):
            for layer in block.layers:
                dtype, device = accumulation_dtype(layer.parameter.dtype), layer.parameter.device
                found[layer.name] = {kind: kind(layer.shape, dtype, device) for kind in kinds}
            for number, batch in enumerate(activations):
                hidden = inputs[index][number].to(chain.residency.device)
                upstream[number], gradients = _block_gradients(chain, index, hidden, batch, upstream[number])
                for layer in block.layers:
                    for sample in range(batch.batch.size):
                        gradient = _sample_gradient(layer, gradients[layer.name], sample, batch.batch.size) / scale
                        for statistic in found[layer.name].values():
                            assert isinstance(statistic, GradientStatistic)
                            statistic.update(gradient)
        inputs[index] = []
        for layer in block.layers:
            for statistic in found[layer.name].values():
                if not torch.isfinite(statistic.total).all():
                    raise PruneForgeError(f"non-finite gradients reach layer {layer.name!r}; run with --dtype float32")
                statistic.to(HOST)
    return found


@torch.no_grad()
def _forward_sweep(
    chain: Chain, activations: Sequence[Activations], progress: Progress
) -> tuple[list[list[Tensor]], list[Tensor]]:
    hidden = [batch.hidden for batch in activations]
    inputs = []
    for index in progress.track(range(len(chain.blocks)), "forward for gradients"):
        inputs.append([h.to(HOST) for h in hidden])
        with chain.residency.visit(chain.blocks[index]):
            check_weights(chain.blocks[index])
            outputs = [chain.run_block(index, h, batch) for h, batch in zip(hidden, activations, strict=True)]
            for before, after, batch in zip(hidden, outputs, activations, strict=True):
                if not torch.isfinite(after).all():
                    _name_the_layer(chain, index, before, batch)
        hidden = [chain.transition(index, h, batch) for h, batch in zip(outputs, activations, strict=True)]
    return inputs, hidden


def _name_the_layer(chain: Chain, index: int, hidden: Tensor, batch: Activations) -> None:
    """Run a block once more to find which layer non-finite activations reach first, and raise."""
    recorder = InputRecorder(chain.blocks[index], [ColumnSquares])
    with recorder.recording():
        recorder.start(batch.batch)
        chain.run_block(index, hidden, batch)
    for layer in chain.blocks[index].layers:
        recorder.statistics(layer)
    raise PruneForgeError(f"non-finite activations leave block {chain.blocks[index].name!r}; run with --dtype float32")


def _head_gradients(
    chain: Chain, activations: Sequence[Activations], outputs: list[Tensor], scale: float
) -> list[Tensor]:
    gradients: list[Tensor] = []
    with chain.residency.stem_and_head(), torch.enable_grad():
        for number, batch in enumerate(activations):
            hidden = outputs[number].detach().requires_grad_()
            losses = chain.losses(hidden, batch.batch)
            if not torch.isfinite(losses).all():
                raise PruneForgeError(f"the loss of calibration batch {number} is not finite")
            gradients += torch.autograd.grad(losses.sum() * scale, hidden)
    return gradients


def _block_gradients(
    chain: Chain, index: int, hidden: Tensor, batch: Activations, upstream: Tensor
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Return the gradient for the block before, and each layer's (input, output gradient) of every pass."""
    layers = chain.blocks[index].layers
    hidden = hidden.detach().requires_grad_()
    passes: list[tuple[str, Tensor, Tensor]] = []
    uses = WeightUses(layers, lambda layer, x, y: passes.append((layer.name, x.detach(), y)))
    with torch.enable_grad():
        with uses:
            output = chain.run_block(index, hidden, batch)
        output = chain.transition(index, output, batch)
    downstream, *gradients = torch.autograd.grad(output, [hidden, *(y for _, _, y in passes)], upstream)
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (name, x, _), gradient in zip(passes, gradients, strict=True):
        by_layer[name].append((x, gradient))
    return downstream, by_layer


def _sample_gradient(layer: Layer, passes: list[tuple[Tensor, Tensor]], sample: int, samples: int) -> Tensor:
    """Return the gradient [out, in] of one sample's loss with respect to the layer's weight."""
    dtype = accumulation_dtype(layer.parameter.dtype)
    total: Tensor | None = None
    for x, gradient in passes:
        inputs = layer.inputs(x, samples)[sample].to(dtype)
        outputs = layer.outputs(gradient, samples)[sample].to(dtype)
        product = outputs.T @ inputs
        total = product if total is None else total + product
    if total is None:
        raise PruneForgeError(f"no calibration batch reached layer {layer.name!r}")
    return total
