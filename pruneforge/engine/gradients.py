"""Per-sample gradients of the dense model, one block at a time from the last to the first.

A forward sweep stores every block's input. The head gives the gradient of each sample's loss with respect to the last
hidden states. Then each block is run again with autograd, which gives the output gradients of its layers and the
gradient for the block before. Whole batches go through at once: a sample's weight gradient is the product of that
sample's own output gradients and inputs, so nothing is averaged over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruneforge.engine.budget import samples_through_head
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import BlockGradients, GradientStore, Kind
from pruneforge.engine.hidden_states import BatchInFlight, Handle
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
"""Factor on the loss that keeps small float16 gradients from underflowing; a power of two, so dividing is exact."""

CACHED_ON_CPU, CACHED_ON_DEVICE = 1 << 19, 1 << 26
"""Values of a sample's gradient that are computed at a time, so that they fit in the processor's cache."""


def gradient_statistics(
    chain: Chain,
    batches: Sequence[BatchInFlight],
    kinds: Sequence[Kind],
    gradient_store: GradientStore,
    group: Group,
    progress: Progress,
) -> None:
    """Put the gradient statistics of every layer into `gradient_store`, except those it has already.

    Args:
        chain: The dense model.
        batches: Its captured batches, at the first block's input; they stay there.
        kinds: The statistics to collect.
        gradient_store: Receives the statistics.
        group: The processes that share the batches.
        progress: Shows progress.

    Raises:
        PruneForgeError: A loss or gradient is not finite, naming the layer.
    """
    # The first process decides for all, so that all do the same work whatever each of them sees in the folder.
    missing = group.gather([gradient_store.missing(block, kinds) for block in chain.blocks])[0]
    if not any(missing):
        return
    scale = LOSS_SCALE.get(batches[0].hidden.dtype, 1.0)
    inputs, outputs = _forward_sweep(chain, batches, progress)
    upstream = _head_gradients(chain, batches, outputs, scale)
    del outputs
    first = next(index for index, wanted in enumerate(missing) if wanted)
    for index in progress.track(range(len(chain.blocks) - 1, first - 1, -1), "gradients", len(chain.blocks) - first):
        block = chain.blocks[index]
        with chain.residency.visit(block):
            statistics: BlockGradients = {layer.name: empty_statistics(layer, missing[index]) for layer in block.layers}
            passing = zip(
                batches, chain.hidden_states.each(inputs[index]), chain.hidden_states.each(upstream), strict=True
            )
            for number, (in_flight, hidden, arriving) in enumerate(passing):
                down, gradients = block_gradients(chain, index, hidden, in_flight, arriving)
                upstream[number] = chain.hidden_states.keep(down)
                if missing[index]:
                    add_batch(block.layers, statistics, gradients, in_flight.batch.size, scale)
                del hidden, arriving, down, gradients  # free them before the next batch's passes
        inputs[index] = []  # free the stored inputs: no earlier block needs them
        if missing[index]:
            _merge(statistics, group, chain.residency.device)
            if group.first or not gradient_store.shared:
                gradient_store.put(block, statistics)
            del statistics
    group.gather(None)  # barrier: wait for the first process's files


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
        PruneForgeError: The batch did not reach a layer.
    """
    for layer in layers:
        passes = gradients[layer.name]
        if not passes:
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


def _merge(statistics: BlockGradients, group: Group, device: torch.device) -> None:
    """Merge the statistics of all processes, and check that they are finite."""
    for name, of_layer in statistics.items():
        for statistic in of_layer.values():
            group.merge(statistic, device)
            if not all_finite(statistic.total):
                raise PruneForgeError(f"non-finite gradients reach layer {name!r}; run with `dtype` float32")


@torch.no_grad()
def _forward_sweep(
    chain: Chain, batches: Sequence[BatchInFlight], progress: Progress
) -> tuple[list[list[Handle]], list[Handle]]:
    """Return every block's inputs and the last block's outputs, one handle per batch."""
    inputs = [[in_flight.handle for in_flight in batches]]
    for index in progress.track(range(len(chain.blocks)), "forward for gradients"):
        block = chain.blocks[index]
        outputs: list[Handle] = []
        finite: list[Tensor] = []
        with chain.residency.visit(block):
            check_weights(block)
            # Flags stay on the device until the block is done, so that the host waits once for all batches.
            for before, in_flight in zip(chain.hidden_states.each(inputs[-1]), batches, strict=True):
                after = chain.run_block(index, before, in_flight)
                finite.append(finite_flag(after))
                outputs.append(chain.hidden_states.keep(after))
            first = first_false(finite)
            if first is not None:
                _name_the_layer(chain, index, inputs[-1][first].get(), batches[first])
        with chain.between(index) as continues:
            if continues:
                outputs = [
                    chain.hidden_states.keep(chain.transition(index, output, in_flight))
                    for output, in_flight in zip(chain.hidden_states.each(outputs), batches, strict=True)
                ]
        inputs.append(outputs)
    return inputs[:-1], inputs[-1]


def _name_the_layer(chain: Chain, index: int, hidden: Tensor, in_flight: BatchInFlight) -> None:
    """Run a block once more to find the first layer that receives non-finite activations, and raise."""
    recorder = InputRecorder(chain.blocks[index], [ColumnSquares])
    with recorder.recording(in_flight.batch):
        chain.run_block(index, hidden, in_flight)
    for layer in chain.blocks[index].layers:
        recorder.statistics(layer)
    raise PruneForgeError(
        f"non-finite activations leave block {chain.blocks[index].name!r}; {mend_non_finite(in_flight.batch)}"
    )


def _head_gradients(
    chain: Chain, batches: Sequence[BatchInFlight], outputs: Sequence[Handle], scale: float
) -> list[Handle]:
    """Return the gradient of each batch's summed losses with respect to the last hidden states.

    With a large vocabulary the logits take far more memory than anything else, so a batch may pass the head a few
    samples at a time.
    """
    gradients: list[Handle] = []
    finite: list[Tensor] = []
    with chain.residency.stem_and_head(), torch.enable_grad(), repeatable_gradients(chain.residency.device):
        for in_flight, output in zip(batches, chain.hidden_states.each(outputs), strict=True):
            together = samples_through_head(in_flight.batch.tokens * chain.adapter.logits_a_token(chain.module))
            parts: list[Tensor] = []
            losses: list[Tensor] = []
            for start in range(0, in_flight.batch.size, together):
                some = slice(start, start + together)
                hidden = output[some].detach().requires_grad_()
                loss = chain.losses(hidden, in_flight.batch.part(some))
                parts += torch.autograd.grad(loss.sum() * scale, hidden)
                losses.append(loss.detach())
            finite.append(finite_flag(torch.cat(losses)))
            gradients.append(chain.hidden_states.keep(torch.cat(parts) if len(parts) > 1 else parts[0]))
    first = first_false(finite)
    if first is not None:
        raise PruneForgeError(f"the loss of calibration batch {first} is not finite")
    return gradients


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
    layers = chain.blocks[index].layers
    hidden = hidden.detach().requires_grad_()
    passes: list[tuple[str, Tensor, Tensor]] = []
    uses = WeightUses(layers, after=lambda layer, x, y: passes.append((layer.name, x.detach(), y)))
    # The backward pass through the transition needs its weights too, so it is within `between`.
    with chain.between(index), repeatable_gradients(chain.residency.device):
        with torch.enable_grad():
            with uses:
                output = chain.run_block(index, hidden, in_flight)
            output = chain.transition(index, output, in_flight)
        downstream, *gradients = torch.autograd.grad(output, [hidden, *(y for _, _, y in passes)], upstream)
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    for (name, x, _), gradient in zip(passes, gradients, strict=True):
        by_layer[name].append((x, gradient))
    return downstream, by_layer
