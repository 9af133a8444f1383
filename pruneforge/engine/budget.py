"""What a run may take in memory, and what it needs besides hidden states."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pruneforge.engine.transfers import bytes_in_host_memory
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block, LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.run import Run, required_statistics
from pruneforge.interfaces.statistics import GradientStatistic, Statistic, empty_statistics
from pruneforge.memory import resident_bytes, usual_tokens_a_batch
from pruneforge.numerics import accumulation_dtype

SHARE_OF_FREE = 0.8
"""How much of the memory that is free at the start a run takes for itself unless it is told."""


SHARE_OF_BATCH = 0.125
"""How much of a budget the working memory of one batch may take."""

BYTES_A_VALUE = 20
"""What a logit, or a number of attention for a pair of tokens, takes where a gradient is wanted: in the model's dtype
and in float32, the softmax, and the gradients of these."""

HEAD_LOGITS = 1 << 27
"""Logits that the head makes at a time, unless one sample has more."""

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Budgets:
    """Bytes that a run may take.

    Attributes:
        host: In host memory, by all processes on a machine; `None` for most of what is free.
        device: On the CUDA device of each process; `None` for most of what is free.
    """

    host: int | None = None
    device: int | None = None

    @classmethod
    def parse(cls, host: str | int | None, device: str | int | None) -> Budgets:
        """Return the budgets of what a user wrote.

        Raises:
            PruneForgeError: One is no number of bytes.
        """
        return cls(_parse(host, "memory budget"), _parse(device, "device memory budget"))

    def tokens_a_batch(self, blocks: Sequence[Block], device: torch.device) -> int:
        """Return how many tokens are to go through a block together: the usual number, or what a small budget holds.

        What happens to be free has no say in it, since the sums of other batches round otherwise.
        """
        usual = usual_tokens_a_batch(device)
        on_cpu = None if self.host is None else self.host // _sharing()
        budget = on_cpu if device.type == "cpu" else self.device
        if budget is None:
            return usual
        return max(1, min(usual, int(SHARE_OF_BATCH * budget / bytes_a_token(blocks))))

    def for_activations(
        self, runs: Sequence[Run], model: LoadedModel, batches: Sequence[Batch], device: torch.device
    ) -> tuple[int, int]:
        """Return what hidden states may take in host memory and on the device, in bytes.

        That is what a budget leaves after weights, statistics and working memory. On the CPU the device's share is 0.
        With several runs in one pass a block is kept dense beside the one that is pruned.

        Raises:
            PruneForgeError: A budget does not even hold those.
        """
        blocks, kinds = runs[0].blocks, required_statistics(runs)
        weights, working = fixed_bytes(blocks, kinds, model.module)
        if any(issubclass(kind, GradientStatistic) for kind in kinds):
            head, attention = gradient_bytes(model, batches, device)
            working = max(working + attention, head)
        if len(runs) > 1:
            working += max(sum(layer.parameter.nbytes for layer in block.layers) for block in blocks)
        resident = resident_bytes()
        here = _sharing()
        host = resident + SHARE_OF_FREE * free_bytes() / here if self.host is None else self.host / here
        # A finished block is held in host memory until it is written; pinned, it takes up to twice as much.
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
    """Return how many bytes each layer of a block has where it is computed or stored, whichever is more."""
    stored = model.checkpoint.tensors.values() if model.checkpoint is not None else []
    widest = max((tensor.dtype.itemsize for tensor in stored), default=0)
    return [la.parameter.numel() * max(la.parameter.element_size(), widest) for la in block.layers]


def gradient_bytes(model: LoadedModel, batches: Sequence[Batch], device: torch.device) -> tuple[int, int]:
    """Return what gradients take besides sums: for the head's logits, and for attention where it is not fused."""
    logits, heads = model.adapter.logits_a_token(model.module), model.adapter.attention_heads(model.module)
    head = max((_head_logits(batch, logits) for batch in batches), default=0)
    pairs = max((batch.size * batch.tokens**2 for batch in batches), default=0) if device.type != "cpu" else 0
    return head * BYTES_A_VALUE, heads * pairs * BYTES_A_VALUE


def _head_logits(batch: Batch, logits_a_token: int) -> int:
    """Return the most logits that the head makes of a batch at a time."""
    sample = batch.tokens * logits_a_token
    return sample * min(batch.size, samples_through_head(sample))


def samples_through_head(logits: int) -> int:
    """Return how many samples of so many logits each pass the head together."""
    return max(1, HEAD_LOGITS // max(1, logits))


def fixed_bytes(blocks: Sequence[Block], kinds: Sequence[type[Statistic]], module: nn.Module) -> tuple[int, int]:
    """Return about how many bytes weights take at a time, and statistics and working memory of a block.

    Weights are two blocks (one is read while one computes), or a block, stem and head. Each layer is counted as if
    it had an input of its own, and the work on the largest as four matrices of its size and of its statistics.
    """
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(p.nbytes for p in module.parameters() if id(p) not in inside)
    block = max(sum(p.nbytes for p in block.module.parameters()) for block in blocks)
    statistics, largest = 0, 0
    for found in blocks:
        sizes = []
        for layer in found.layers:
            made = [
                statistic.total.nbytes for statistic in empty_statistics(layer, kinds, torch.device("meta")).values()
            ]
            sizes.append(sum(made))
            matrix = layer.parameter.numel() * accumulation_dtype(layer.parameter.dtype).itemsize
            largest = max(largest, 4 * max([matrix, *made]))
        statistics = max(statistics, sum(sizes))
    return block + max(block, outside), statistics + largest


def bytes_a_token(blocks: Sequence[Block]) -> int:
    """Return about how many bytes a token takes while it passes a block: what goes into its layers and comes out."""
    return max(sum(sum(layer.shape) * layer.parameter.element_size() for layer in block.layers) for block in blocks)


def free_bytes() -> int:
    """Return how much host memory is free for this process: the machine's, or what its control group leaves."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 1 << 18
    free = pages * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(found[1]) * 1024 if found else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


def free_on_device(device: torch.device) -> int:
    """Return how much memory of a CUDA device is free, with what torch holds there and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _sharing() -> int:
    """Return how many processes of the run share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left(budget: float, needed: int, what: str, given: int | None) -> int:
    if budget < needed and given is not None:
        raise PruneForgeError(f"the {what} of {given:,} bytes is too small; this run needs about {needed:,}")
    return max(0, int(budget - needed))


def _parse(value: str | int | None, what: str) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
    if not found or not float(found[1]):
        raise PruneForgeError(f"{what} {value!r} is no number of bytes; write it like 3GB or 512MiB")
    return int(float(found[1]) * UNITS[found[2] or ""])
