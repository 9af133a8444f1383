"""Per-sample gradients of the dense model, one block at a time from the last to the first.

A forward sweep stores every block's input. The head gives the gradient of each sample's loss with respect to the last
hidden states. Then each block is run again with autograd, which gives the output gradients of its layers and the
gradient for the block before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruneforge.engine.backward import LOSS_SCALE, add_batch, block_gradients, check_separable, merge_gradients
from pruneforge.engine.budget import samples_through_head
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import BlockGradients, GradientStore, Kind
from pruneforge.engine.hidden_states import BatchInFlight, Handle
from pruneforge.engine.processes import Group
from pruneforge.engine.recorder import InputRecorder, check_weights, mend_non_finite
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.statistics import empty_statistics
from pruneforge.interfaces.summaries import ColumnSquares
from pruneforge.numerics import finite_flag, first_false, repeatable_gradients
from pruneforge.progress import Progress


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
    check_separable(
        [layer for block in chain.blocks for layer in block.layers], max(in_flight.batch.size for in_flight in batches)
    )
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
            merge_gradients(statistics, group, chain.residency.device)
            if group.first or not gradient_store.shared:
                gradient_store.put(block, statistics)
            del statistics
    group.gather(None)  # barrier: wait for the first process's files


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
    samples at a time, unless the objective compares them.
    """
    gradients: list[Handle] = []
    finite: list[Tensor] = []
    with chain.residency.stem_and_head(), torch.enable_grad(), repeatable_gradients(chain.residency.device):
        for in_flight, output in zip(batches, chain.hidden_states.each(outputs), strict=True):
            logits = chain.adapter.logits_a_token(chain.module)
            together = samples_through_head(in_flight.batch, logits, chain.whole_batches)
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
