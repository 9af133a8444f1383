"""Run a plugin's code for a layer: seeded, watched for changes in place, and named if it fails."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Pruned
from pruneforge.interfaces.patterns import Unstructured
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.numerics import all_finite, seed_random_numbers

T = TypeVar("T")

LEAST_OF_ASKED = 0.9
"""Share of the weights asked for that a method with its own comparison groups must prune; each group rounds down."""


def guarded(run: Run, layer: Layer, stats: LayerStatistics, who: str, work: Callable[[], T]) -> T:
    """Return what a plugin's code gives for a layer.

    Its random numbers are the layer's own, whichever layers came before it in this process.

    Args:
        run: The run.
        layer: The layer.
        stats: Its statistics.
        who: What messages call the plugin: "metric 'mine'".
        work: Calls the plugin.

    Raises:
        PruneForgeError: The plugin fails, or changes the layer's weight or a statistic.
    """
    seed_random_numbers(run.seed * 0x9E3779B1 + zlib.crc32(layer.name.encode()), layer.parameter.device)
    before = _versions(layer, stats)
    try:
        result = work()
    except (PruneForgeError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        raise PruneForgeError(f"{who} failed on layer {layer.name!r}: {reason}") from error
    for changed, (name, version) in zip(_versions(layer, stats).values(), before.items(), strict=True):
        if changed != version:
            raise PruneForgeError(f"{who} changed {name} of layer {layer.name!r} in place; it must work on a copy")
    return result


def check_pruned(run: Run, layer: Layer, pruned: Pruned, who: str) -> None:
    """Raise unless a mask fits the layer's pattern and the weights are finite in the layer's dtype.

    Raises:
        PruneForgeError: Naming `who` made them, and the layer.
    """
    if not isinstance(pruned, Pruned):
        raise PruneForgeError(f"{who} returned {type(pruned).__name__} for layer {layer.name!r}; it must return Pruned")
    if isinstance(pruned.notes, str):
        raise PruneForgeError(f"{who} gave notes for layer {layer.name!r} as one text; they must be a tuple of texts")
    mask, pattern = pruned.mask, run.pattern_for(layer)
    if mask.dtype != torch.bool or mask.shape != layer.shape:
        raise PruneForgeError(
            f"{who} made a mask of {mask.dtype} {tuple(mask.shape)} for layer {layer.name!r}; "
            f"it must be boolean {layer.shape}"
        )
    # With comparison groups of its own, a method rounds the count in each of them, and the total may differ from the
    # layer's. N:M patterns leave no such freedom, and counts over several layers are checked when all are done.
    unstructured = isinstance(pattern, Unstructured)
    own_groups = unstructured and (run.metric.scope is None or run.scope in ("block", "model"))
    if not own_groups and not pattern.fits(mask):
        raise PruneForgeError(f"{who} made a mask for layer {layer.name!r} that does not fit {pattern}")
    if pruned.weight is not None:
        if pruned.weight.shape != layer.shape:
            raise PruneForgeError(f"{who} made weights of {tuple(pruned.weight.shape)} for layer {layer.name!r}")
        if not all_finite(pruned.weight.to(layer.parameter.dtype)):
            if all_finite(pruned.weight):
                dtype = layer.parameter.dtype
                raise PruneForgeError(f"{who} made weights in layer {layer.name!r} that are too large for {dtype}")
            raise PruneForgeError(f"{who} made non-finite weights in layer {layer.name!r}")


def check_share(run: Run, layer: Layer, mask: Tensor) -> None:
    """Raise if a method with comparison groups of its own prunes far fewer or more weights than asked for.

    Args:
        run: The run.
        layer: The layer.
        mask: Its mask on the CPU, where counting makes no device wait.

    Raises:
        PruneForgeError: Naming the layer.
    """
    pattern = run.pattern_for(layer)
    if run.metric.scope is not None or not isinstance(pattern, Unstructured):
        return
    pruned, total = mask.numel() - int(mask.count_nonzero()), mask.numel()
    least = LEAST_OF_ASKED * pattern.sparsity * total - layer.shape[1]  # each group, of a column or more, rounds down
    most = total - LEAST_OF_ASKED * (1 - pattern.sparsity) * total
    if not least <= pruned <= most:
        raise PruneForgeError(
            f"metric {run.metric.name!r} pruned {pruned / total:.1%} of layer {layer.name!r}, "
            f"where {pattern.sparsity:.1%} was asked for"
        )


def _versions(layer: Layer, stats: LayerStatistics) -> dict[str, int]:
    """Return how often the weight and each statistic were changed in place, as torch counts it."""
    versions = {"the weight": _version(layer.parameter)}
    for kind, statistic in stats.items():
        versions[f"statistic {kind.__name__}"] = _version(statistic.total)
    return versions


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
