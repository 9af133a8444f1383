"""Per-sample gradients of the dense model, one block at a time from the last to the first.

A forward sweep keeps every block's input. The head gives the gradient of each sample's loss with
respect to the last hidden states; then each block is run again with autograd on, which gives its
layers' output gradients and hands the gradient on to the block before. Batches go through whole: a
sample's weight gradient is the product of that sample's own output gradients and inputs, so nothing
is averaged over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruneforge.engine.budget import samples_through_head
from pruneforge.engine.chain import Activations, Chain
from pruneforge.engine.gradient_store import Gradients, GradientStore, Kind
from pruneforge.engine.hidden_states import Kept
from pruneforge.engine.processes import Group
from pruneforge.engine.recorder import InputRecorder, WeightUses, check_weights, mend_non_finite
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import ColumnSquares, empty_statistics
from pruneforge.numerics import (
    accumulation_dtype,
    all_finite,
    finite_flag,
    first_false,
    products_of,
    repeatable_gradients,
)
from pruneforge.progress import Progress

LOSS_SCALE = {torch.float16: 2.0**12}
"""Keeps small gradients of half-precision models from vanishing; a power of two, taken out again exactly."""

CACHED_ON_CPU, CACHED_ON_DEVICE = 1 << 19, 1 << 26
"""Values of a sample's gradient that are made at a time."""


def gradient_statistics(
    chain: Chain,
    activations: Sequence[Activations],
    kinds: Sequence[Kind],
    store: GradientStore,
    group: Group,
    progress: Progress,
) -> None:
    """Put the gradient statistics of every layer into `store`; `activations` are left as they are.

    What the store already has is not computed again.

    Args:
        chain: The dense model.
        activations: Its captured batches, at the first block's input.
        kinds: The statistics to collect.
        store: Where they go.
        group: The processes that share the batches.
        progress: Where to show how far along the sweeps are.

    Raises:
        PruneForgeError: A loss or gradient is not finite, naming the layer.
    """
    missing = group.gather([store.missing(block, kinds) for block in chain.blocks])[0]
    if not any(missing):
        return
    scale = LOSS_SCALE.get(activations[0].hidden.dtype, 1.0)
    inputs, outputs = _forward_sweep(chain, activations, progress)
    upstream = _head_gradients(chain, activations, outputs, scale)
    del outputs
    first = next(index for index, wanted in enumerate(missing) if wanted)
    for index in progress.track(range(len(chain.blocks) - 1, first - 1, -1), "gradients", len(chain.blocks) - first):
        block = chain.blocks[index]
        with chain.residency.visit(block):
            found: Gradients = {layer.name: empty_statistics(layer, missing[index]) for layer in block.layers}
            passing = zip(activations, chain.store.each(inputs[index]), chain.store.each(upstream), strict=True)
            for number, (batch, hidden, arriving) in enumerate(passing):
                down, gradients = block_gradients(chain, index, hidden, batch, arriving)
                upstream[number] = chain.store.keep(down)
                if missing[index]:
                    update(block.layers, found, gradients, batch.batch.size, scale)
                del hidden, arriving, down, gradients  # not held through the next batch's passes
        inputs[index] = []
        if missing[index]:
            _merge(found, group, chain.residency.device)
            if group.first or not store.shared:
                store.put(block, found)
            del found
    group.gather(None)  # nobody looks for what the first process still writes


def update(
    layers: Sequence[Layer],
    found: Gradients,
    gradients: dict[str, list[tuple[Tensor, Tensor]]],
    samples: int,
    scale: float,
) -> None:
    """Add one batch to statistics.

    A sample's gradient is made a few rows at a time where the statistics allow it, and added up while it is still in
    the processor's cache: whole, it would go to memory and back for every sample.

    Args:
        layers: The layers.
        found: Their statistics, by name.
        gradients: What `block_gradients` returned.
        samples: How many samples the batch has.
        scale: What the loss was multiplied by.
    """
    for layer in layers:
        passes = gradients[layer.name]
        if not passes:
            raise PruneForgeError(f"no calibration batch reached layer {layer.name!r}")
        dtype = accumulation_dtype(layer.parameter.dtype)
        pairs = [(layer.outputs(dy, samples).to(dtype), layer.inputs(x, samples).to(dtype)) for x, dy in passes]
        if scale != 1:
            pairs = [(dy / scale, x) for dy, x in pairs]
        statistics = list(found[layer.name].values())
        out_features, in_features = layer.shape
        cached = CACHED_ON_CPU if layer.parameter.device.type == "cpu" else CACHED_ON_DEVICE
        together = cached // in_features
        step = max(1, min(out_features, together)) if all(s.by_rows for s in statistics) else out_features
        buffer = torch.empty(step, in_features, dtype=dtype, device=layer.parameter.device)
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            parts = [statistic.part(rows) for statistic in statistics]
            gradient = buffer[: rows.stop - rows.start]
            for sample in range(samples):
                with products_of(layer.parameter.dtype, layer.parameter.device):
                    for number, (dy, x) in enumerate(pairs):
                        torch.addmm(gradient, dy[sample, :, rows].T, x[sample], beta=min(number, 1), out=gradient)
                for part in parts:
                    part.add(gradient)
        for statistic in statistics:
            statistic.samples += samples


def _merge(found: Gradients, group: Group, device: torch.device) -> None:
    for name, statistics in found.items():
        for statistic in statistics.values():
            group.merge(statistic, device)
            if not all_finite(statistic.total):
                raise PruneForgeError(f"non-finite gradients reach layer {name!r}; run with `dtype` float32")


@torch.no_grad()
def _forward_sweep(
    chain: Chain, activations: Sequence[Activations], progress: Progress
) -> tuple[list[list[Kept]], list[Kept]]:
    """Return every block's inputs, and the last block's outputs, a tensor a batch."""
    inputs = [[batch.kept for batch in activations]]
    for index in progress.track(range(len(chain.blocks)), "forward for gradients"):
        block = chain.blocks[index]
        outputs: list[Kept] = []
        finite: list[Tensor] = []
        with chain.residency.visit(block):
            check_weights(block)
            for before, batch in zip(chain.store.each(inputs[-1]), activations, strict=True):
                after = chain.run_block(index, before, batch)
                finite.append(finite_flag(after))
                outputs.append(chain.store.keep(after))
            first = first_false(finite)
            if first is not None:
                _name_the_layer(chain, index, inputs[-1][first].get(), activations[first])
        with chain.between(index) as continues:
            if continues:
                outputs = [
                    chain.store.keep(chain.transition(index, output, batch))
                    for output, batch in zip(chain.store.each(outputs), activations, strict=True)
                ]
        inputs.append(outputs)
    return inputs[:-1], inputs[-1]


def _name_the_layer(chain: Chain, index: int, hidden: Tensor, batch: Activations) -> None:
    """Run a block once more to find which layer non-finite activations reach first, and raise."""
    recorder = InputRecorder(chain.blocks[index], [ColumnSquares])
    with recorder.recording(batch.batch):
        chain.run_block(index, hidden, batch)
    for layer in chain.blocks[index].layers:
        recorder.statistics(layer)
    raise PruneForgeError(
        f"non-finite activations leave block {chain.blocks[index].name!r}; {mend_non_finite(batch.batch)}"
    )


def _head_gradients(
    chain: Chain, activations: Sequence[Activations], outputs: Sequence[Kept], scale: float
) -> list[Kept]:
    """Return the gradient of each batch's summed losses with respect to the last hidden states.

    Logits take far more memory than anything else of a token where the vocabulary is large, so a batch may pass the
    head a few samples at a time.
    """
    gradients: list[Kept] = []
    finite: list[Tensor] = []
    with chain.residency.stem_and_head(), torch.enable_grad(), repeatable_gradients(chain.residency.device):
        for batch, output in zip(activations, chain.store.each(outputs), strict=True):
            together = samples_through_head(batch.batch.tokens * chain.adapter.logits_a_token(chain.module))
            parts: list[Tensor] = []
            losses: list[Tensor] = []
            for start in range(0, batch.batch.size, together):
                some = slice(start, start + together)
                hidden = output[some].detach().requires_grad_()
                loss = chain.losses(hidden, batch.batch.part(some))
                parts += torch.autograd.grad(loss.sum() * scale, hidden)
                losses.append(loss.detach())
            finite.append(finite_flag(torch.cat(losses)))
            gradients.append(chain.store.keep(torch.cat(parts) if len(parts) > 1 else parts[0]))
    first = first_false(finite)
    if first is not None:
        raise PruneForgeError(f"the loss of calibration batch {first} is not finite")
    return gradients


def block_gradients(
    chain: Chain, index: int, hidden: Tensor, batch: Activations, upstream: Tensor
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Return the gradient for the block before, and each layer's (input, output gradient) of every pass."""
    layers = chain.blocks[index].layers
    hidden = hidden.detach().requires_grad_()
    passes: list[tuple[str, Tensor, Tensor]] = []
    uses = WeightUses(layers, after=lambda layer, x, y: passes.append((layer.name, x.detach(), y)))
    with chain.between(index), repeatable_gradients(chain.residency.device):
        with torch.enable_grad():
            with uses:
                output = chain.run_block(index, hidden, batch)
            output = chain.transition(index, output, batch)
        downstream, *gradients = torch.autograd.grad(output, [hidden, *(y for _, _, y in passes)], upstream)
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    for (name, x, _), gradient in zip(passes, gradients, strict=True):
        by_layer[name].append((x, gradient))
    return downstream, by_layer
