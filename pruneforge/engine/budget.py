"""Memory budgets of a run, and estimates of what it needs besides hidden states."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pruneforge.engine.processes import ON_THIS_MACHINE, process_count
from pruneforge.engine.transfers import bytes_in_host_memory
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block, LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.recovery import recovers_blocks, recovers_models
from pruneforge.interfaces.run import Run, needed_to_allocate, required_statistics
from pruneforge.interfaces.statistics import GradientStatistic, Statistic, empty_statistics, kind_of, of_model_gradients
from pruneforge.memory import free_bytes, resident_bytes, usual_tokens_a_batch
from pruneforge.numerics import accumulation_dtype

SHARE_OF_FREE = 0.8
"""Share of the memory free at the start that a run uses by default."""


SHARE_OF_BATCH = 0.125
"""Share of a budget for the working memory of one batch."""

BYTES_A_VALUE = 20
"""Bytes for each logit, and for each attention score of a pair of tokens, where gradients are computed: the value in
the model's dtype and in float32, its softmax, and the gradients of these."""

HEAD_LOGITS = 1 << 27
"""Logits that the head computes at a time, unless one sample has more."""

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Budgets:
    """Bytes that a run may use.

    Attributes:
        host: In host memory, for all processes on a machine together; `None` for most of the free memory.
        device: On the CUDA device of each process; `None` for most of the free memory.
    """

    host: int | None = None
    device: int | None = None

    @classmethod
    def parse(cls, host: str | int | None, device: str | int | None) -> Budgets:
        """Parse budgets such as `8GB`, `512MiB` or a number of bytes.

        Raises:
            PruneForgeError: One of them is not a number of bytes.
        """
        return cls(_parse(host, "memory budget"), _parse(device, "device memory budget"))

    def tokens_a_batch(self, blocks: Sequence[Block], device: torch.device) -> int:
        """Return how many tokens should go through a block together: the usual number, or fewer on a small budget.

        Free memory is ignored on purpose: another batch size would round differently, and so change masks.
        """
        usual = usual_tokens_a_batch(device)
        on_cpu = None if self.host is None else self.host // process_count(ON_THIS_MACHINE)
        budget = on_cpu if device.type == "cpu" else self.device
        if budget is None:
            return usual
        return max(1, min(usual, int(SHARE_OF_BATCH * budget / bytes_a_token(blocks))))

    def for_activations(
        self, runs: Sequence[Run], model: LoadedModel, batches: Sequence[Batch], device: torch.device
    ) -> tuple[int, int]:
        """Return how many bytes of hidden states fit in host memory and on the device.

        This is what the budgets leave after weights, statistics and working memory. On the CPU the device's share is
        0. With several runs in one pass a dense copy of the block's layers is kept beside the pruned block.

        Raises:
            PruneForgeError: A given budget is too small for the rest.
        """
        blocks, kinds = runs[0].blocks, [kind_of(required) for required in required_statistics(runs)]
        weights, working = fixed_bytes(blocks, kinds, model.module)
        for run in runs:  # their own pass comes before, with statistics of its own
            if run.allocator is not None:
                measured = [kind_of(required) for required in needed_to_allocate(run)]
                working = max(working, fixed_bytes(blocks, measured, model.module)[1])
        together = any(run.objective is not None and run.objective.whole_batches for run in runs)
        head, attention = gradient_bytes(model, batches, device, together)
        if any(issubclass(kind, GradientStatistic) for kind in kinds):
            working += attention
        if any(map(of_model_gradients, kinds)):
            working = max(working, head)
        if len(runs) > 1:
            working += max(sum(la.size * la.parameter.element_size() for la in block.layers) for block in blocks)
        if any(recovers_blocks(run.recovery) for run in runs):
            trains = any(run.recovery is not None and run.recovery.targets for run in runs)
            working += recovery_bytes(blocks) + (attention if trains else 0)
        if any(recovers_models(run.recovery) for run in runs):  # afterwards, which holds the model whole
            whole = sum(each.numel() * each.element_size() for each in model.module.parameters())
            working = max(working, whole - weights)
        resident = resident_bytes()
        here = process_count(ON_THIS_MACHINE)
        host = resident + SHARE_OF_FREE * free_bytes() / here if self.host is None else self.host / here
        # A finished block stays in host memory until it is written; pinned, it takes up to twice as much.
        pinned = device.type == "cuda"
        written = max(
            sum(bytes_in_host_memory(size, pinned) for size in written_bytes(block, model)) for block in blocks
        )
        if device.type == "cpu":
            return _left(host, resident + weights + working + written, "memory budget", self.host), 0
        on_device = SHARE_OF_FREE * free_on_device(device) if self.device is None else self.device
        return (
            _left(host, resident + weights + written, "memory budget", self.host),
            _left(on_device, weights + working, "device memory budget", self.device),
        )


def written_bytes(block: Block, model: LoadedModel) -> list[int]:
    """Return the bytes of each layer of a block, in its own or in the checkpoint's widest dtype, if that is wider."""
    stored = model.checkpoint.tensors.values() if model.checkpoint is not None else []
    widest = max((tensor.dtype.itemsize for tensor in stored), default=0)
    return [la.size * max(la.parameter.element_size(), widest) for la in block.layers]


def gradient_bytes(
    model: LoadedModel, batches: Sequence[Batch], device: torch.device, whole_batches: bool = False
) -> tuple[int, int]:
    """Return the working memory of gradients in bytes: for the head's logits, and for attention that is not fused."""
    logits, heads = model.adapter.logits_a_token(model.module), model.adapter.attention_heads(model.module)
    # Only CUDA runs attention as plain products, which hold a score for each pair of tokens; see
    # `numerics.repeatable_gradients`.
    through = (min(batch.size, samples_through_head(batch, logits, whole_batches)) * batch.tokens for batch in batches)
    head = max(through, default=0) * logits
    pairs = max((batch.size * batch.tokens**2 for batch in batches), default=0) if device.type != "cpu" else 0
    return head * BYTES_A_VALUE, heads * pairs * BYTES_A_VALUE


def samples_through_head(batch: Batch, logits_a_token: int, whole_batches: bool) -> int:
    """Return how many samples of a batch pass the head together: as many as the logits allow, or all."""
    return batch.size if whole_batches else max(1, HEAD_LOGITS // max(1, batch.tokens * logits_a_token))


def fixed_bytes(blocks: Sequence[Block], kinds: Sequence[type[Statistic]], module: nn.Module) -> tuple[int, int]:
    """Estimate the bytes of weights in memory at a time, and of a block's statistics and working memory.

    Weights are two blocks (one is read while the other computes), or one block, stem and head. Each layer is counted
    as if it had its own input, and the work on the largest one as four matrices of its size or its statistics' size.
    """
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(p.nbytes for p in module.parameters() if id(p) not in inside)
    block_bytes = max(sum(p.nbytes for p in block.module.parameters()) for block in blocks)
    statistics, largest = 0, 0
    for block in blocks:
        sizes = []
        for layer in block.layers:
            made = [
                statistic.total.nbytes for statistic in empty_statistics(layer, kinds, torch.device("meta")).values()
            ]
            sizes.append(sum(made))
            matrix = layer.size * accumulation_dtype(layer.parameter.dtype).itemsize
            largest = max(largest, 4 * max([matrix, *made]))
        statistics = max(statistics, sum(sizes))
    return block_bytes + max(block_bytes, outside), statistics + largest


def recovery_bytes(blocks: Sequence[Block]) -> int:
    """Estimate the bytes that recovering a block takes.

    They are the weights before pruning and before recovery, the weights in float32 or better, their gradients, and two
    moments of an optimizer.
    """
    parameters = [[*block.module.parameters()] for block in blocks]
    return 6 * max(sum(p.numel() * accumulation_dtype(p.dtype).itemsize for p in of_block) for of_block in parameters)


def bytes_a_token(blocks: Sequence[Block]) -> int:
    """Estimate the bytes of a token while it passes a block: the inputs and outputs of all its layers."""
    return max(sum(sum(layer.shape) * layer.parameter.element_size() for layer in block.layers) for block in blocks)


def free_on_device(device: torch.device) -> int:
    """Return the bytes free on a CUDA device, including memory that torch has reserved and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _left(budget: float, needed: int, what: str, given: int | None) -> int:
    """Return what a budget leaves, 0 at least; raise if the user gave one that is too small."""
    if budget < needed and given is not None:
        raise PruneForgeError(f"the {what} of {given:,} bytes is too small; this run needs about {needed:,}")
    return max(0, int(budget - needed))


def _parse(value: str | int | None, what: str) -> int | None:
    """Parse a number of bytes with an optional unit."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
    count = float(match[1]) * UNITS[match[2] or ""] if match else 0.0
    if not 0 < count < math.inf:
        raise PruneForgeError(f"{what} {value!r} is not a number of bytes; write it like 3GB or 512MiB")
    return int(count)
