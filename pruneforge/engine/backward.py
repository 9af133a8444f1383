"""Gradients of one block's weights, each sample's own, summed into statistics.

A sample's weight gradient is the product of that sample's own output gradients and inputs, so whole batches go through
together and nothing is averaged over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import BlockGradients
from pruneforge.engine.guard import named
from pruneforge.engine.hidden_states import BatchInFlight
from pruneforge.engine.processes import Group
from pruneforge.engine.recorder import WeightUses
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import BlockGradientStatistic, empty_statistics
from pruneforge.numerics import accumulation_dtype, all_finite, products_of, repeatable_gradients

LOSS_SCALE = {torch.float16: 2.0**12}
"""Factor on the loss that keeps small float16 gradients from underflowing; a power of two, so dividing is exact."""

CACHED_ON_CPU, CACHED_ON_DEVICE = 1 << 19, 1 << 26
"""Values of a sample's gradient that are computed at a time, so that they fit in the processor's cache."""


def block_gradients(
    chain: Chain, index: int, hidden: Tensor, in_flight: BatchInFlight, upstream: Tensor
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Run one block forward and backward.

    Args:
        chain: The dense model, with the block on the device.
        index: The block.
        hidden: Its input [samples, ..., hidden].
        in_flight: The batch.
        upstream: Gradient of the next block's input.

    Returns:
        The gradient of `hidden`, and for each layer, by name, an (input, output gradient) pair for each use.
    """
    # The backward pass through the transition needs its weights too, so it is within `between`.
    with chain.between(index), repeatable_gradients(chain.residency.device):
        hidden, output, passes = differentiable(chain, index, hidden, in_flight)
        with torch.enable_grad():
            output = chain.transition(index, output, in_flight)
        downstream, *gradients = torch.autograd.grad(output, [hidden, *(y for _, _, y in passes)], upstream)
    return downstream, by_layer(chain.blocks[index].layers, passes, gradients)


Passes = list[tuple[str, Tensor, Tensor]]
"""Layer name, input and output, which is differentiable, of each use of a layer."""


def differentiable(chain: Chain, index: int, hidden: Tensor, in_flight: BatchInFlight) -> tuple[Tensor, Tensor, Passes]:
    """Run a block with autograd; return its input and output, which are differentiable, and its layers' uses."""
    hidden = hidden.detach().requires_grad_()
    passes: Passes = []
    uses = WeightUses(chain.blocks[index].layers, after=lambda layer, x, y: passes.append((layer.name, x.detach(), y)))
    with torch.enable_grad(), uses:
        output = chain.run_block(index, hidden, in_flight)
    return hidden, output, passes


def by_layer(
    layers: Sequence[Layer], passes: Passes, gradients: Sequence[Tensor]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return for each layer, by name, an (input, output gradient) pair for each use."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    for (name, x, _), gradient in zip(passes, gradients, strict=True):
        found[name].append((x, gradient))
    return found


class BlockGradientRecorder:
    """Collects gradients of losses on the block's own output, batch by batch.

    Attributes:
        statistics: By layer name and class.
    """

    def __init__(self, block: Block, kinds: Sequence[type[BlockGradientStatistic]]) -> None:
        """Start empty, with the statistics `kinds` of each layer of `block`."""
        self.statistics: BlockGradients = {layer.name: empty_statistics(layer, kinds) for layer in block.layers}
        self._block = block
        self._of_loss: dict[Any, list[type[BlockGradientStatistic]]] = {}
        for kind in kinds:
            self._of_loss.setdefault((kind.loss, kind.with_target), []).append(kind)

    def record(self, chain: Chain, index: int, hidden: Tensor, in_flight: BatchInFlight, target: Tensor | None) -> None:
        """Add the gradients of a batch.

        Args:
            chain: The model, with the dense block on the device.
            index: The block.
            hidden: Its input [samples, ..., hidden].
            in_flight: The batch.
            target: Its output in the dense model, if that is known.

        Raises:
            PruneForgeError: A loss is not one number for each sample.
        """
        if not self._of_loss:
            return
        layers, samples = self._block.layers, in_flight.batch.size
        scale = LOSS_SCALE.get(hidden.dtype, 1.0)
        with repeatable_gradients(chain.residency.device), torch.enable_grad():
            _, output, passes = differentiable(chain, index, hidden, in_flight)
            for number, ((loss, _), kinds) in enumerate(self._of_loss.items(), 1):
                who, aim = f"statistic {kinds[0].__name__}", target if kinds[0].with_target else None
                losses = named(who, f"on block {self._block.name!r}", partial(loss, output, in_flight.batch, aim))
                if not isinstance(losses, Tensor) or losses.shape != (samples,) or not losses.requires_grad:
                    made = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                    raise PruneForgeError(
                        f"{who} made a loss of {made} for {samples} samples; it must be one number for each, made of "
                        "the block's output"
                    )
                uses = [y for _, _, y in passes]
                gradients = torch.autograd.grad(losses.sum() * scale, uses, retain_graph=number < len(self._of_loss))
                of_kinds: BlockGradients = {}
                for name, of_layer in self.statistics.items():
                    of_kinds[name] = {kind: of_layer[kind] for kind in kinds}
                with torch.no_grad():
                    add_batch(layers, of_kinds, by_layer(layers, passes, gradients), samples, scale)

    def merge(self, group: Group, device: torch.device) -> None:
        """Merge the statistics of all processes, and check that they are finite."""
        merge_gradients(self.statistics, group, device)


def add_batch(
    layers: Sequence[Layer],
    statistics: BlockGradients,
    gradients: dict[str, list[tuple[Tensor, Tensor]]],
    samples: int,
    scale: float,
) -> None:
    """Add the gradients of one batch to statistics.

    Where the statistics allow it, a sample's gradient is computed a few rows at a time and added up while it is in the
    processor's cache; whole, it would go to memory and back for every sample.

    Args:
        layers: The layers.
        statistics: Their statistics, by layer name; updated in place.
        gradients: As returned by `block_gradients`.
        samples: Number of samples in the batch.
        scale: Factor on the loss.

    Raises:
        PruneForgeError: The batch did not reach a layer, or a routed layer cannot tell its samples apart.
    """
    check_separable(layers, samples)
    for layer in layers:
        passes = gradients[layer.name]
        if not passes and not layer.routed:
            raise PruneForgeError(f"no calibration batch reached layer {layer.name!r}")
        dtype = accumulation_dtype(layer.parameter.dtype)
        pairs = [(layer.outputs(dy, samples).to(dtype), layer.inputs(x, samples).to(dtype)) for x, dy in passes]
        if scale != 1:
            pairs = [(dy / scale, x) for dy, x in pairs]
        of_layer = list(statistics[layer.name].values())
        out_features, in_features = layer.shape
        cached = CACHED_ON_CPU if layer.parameter.device.type == "cpu" else CACHED_ON_DEVICE
        together = cached // in_features
        step = max(1, min(out_features, together)) if all(s.by_rows for s in of_layer) else out_features
        buffer = torch.empty(step, in_features, dtype=dtype, device=layer.parameter.device)
        if not pairs:
            buffer.zero_()
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            parts = [statistic.part(rows) for statistic in of_layer]
            gradient = buffer[: rows.stop - rows.start]
            for sample in range(samples):
                with products_of(layer.parameter.dtype, layer.parameter.device):
                    # A weight that is used several times sums up its uses; with beta 0 the first one overwrites the
                    # buffer, whatever it holds.
                    for number, (dy, x) in enumerate(pairs):
                        torch.addmm(gradient, dy[sample, :, rows].T, x[sample], beta=min(number, 1), out=gradient)
                for part in parts:
                    part.add(gradient)
        for statistic in of_layer:
            statistic.samples += samples
            statistic.tokens += sum(x.shape[:2].numel() for _, x in pairs)


def check_separable(layers: Iterable[Layer], samples: int) -> None:
    """Raise unless each layer can tell the samples of a batch apart.

    Raises:
        PruneForgeError: Naming a layer that cannot, since its tokens are routed.
    """
    routed = next((layer for layer in layers if layer.routed), None)
    if routed is not None and samples > 1:
        raise PruneForgeError(
            f"layer {routed.name!r} receives the tokens that are routed to it, whichever of the batch's {samples} "
            "samples they are of, and gradients are each sample's own; calibrate with `batch_size` 1"
        )


def merge_gradients(statistics: BlockGradients, group: Group, device: torch.device) -> None:
    """Merge the statistics of all processes, and check that they are finite."""
    for name, of_layer in statistics.items():
        for statistic in of_layer.values():
            group.merge(statistic, device)
            if not all_finite(statistic.total):
                raise PruneForgeError(f"non-finite gradients reach layer {name!r}; run with `dtype` float32")
