"""Run a plugin's code for a layer: seeded, watched for changes in place, and named if it fails."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from pruneforge.checkpoint.tensors import as_bytes
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Pruned, measures_scores
from pruneforge.interfaces.patterns import Pattern, Unstructured
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.memory import is_full_memory
from pruneforge.numerics import all_finite, seed_random_numbers

T = TypeVar("T")

LEAST_OF_ASKED = 0.9
"""Share of the weights asked for that a method with its own comparison groups must prune; each group rounds down."""


def guarded(run: Run, layer: Layer, stats: LayerStatistics, who: str, work: Callable[[], T], part: int = 0) -> T:
    """Return what a plugin's code gives for a layer.

    Its random numbers are the layer's and the part's own, whichever layers came before it in this process.

    Args:
        run: The run.
        layer: The layer.
        stats: Its statistics.
        who: What messages call the plugin: "metric 'mine'".
        work: Calls the plugin.
        part: Position among the run's metric and refiners.

    Raises:
        PruneForgeError: The plugin fails, or changes the layer's weight or a statistic.
    """
    seed_for(run.seed, layer.name, layer.parameter.device, part)
    with unchanged(who, [(layer, stats)]):
        return named(who, f"on layer {layer.name!r}", work)


def metric_score(run: Run, layer: Layer, stats: LayerStatistics) -> Tensor:
    """Return a layer's scores [out, in]; equal at each call, since random numbers are seeded by layer."""
    who = f"metric {run.metric.name!r}"
    own = stats.owned_by(run.metric)
    return guarded(run, layer, own, who, lambda: run.metric.checked_score(layer, own))


def score_measures(run: Run, layer: Layer, stats: LayerStatistics) -> dict[str, float]:
    """Return what a run's metric measures of a layer's scores; nothing if it measures none.

    Raises:
        PruneForgeError: It fails, or returns something else than finite numbers.
    """
    if not measures_scores(run.metric):
        return {}
    who, own, score = f"metric {run.metric.name!r}", stats.owned_by(run.metric), metric_score(run, layer, stats)
    made = guarded(run, layer, own, who, lambda: run.metric.measure(layer, score, own))
    if not isinstance(made, Mapping) or not all(isinstance(v, int | float) and isfinite(v) for v in made.values()):
        raise PruneForgeError(f"{who} measured of layer {layer.name!r} what is not finite numbers by name: {made!r}")
    return {str(name): value for name, value in made.items()}


@contextmanager
def unchanged(who: str, layers: Sequence[tuple[Layer, LayerStatistics]], weights: bool = True) -> Iterator[None]:
    """Raise at the end of the context if a layer's weight or a statistic was changed in place.

    Args:
        who: What messages call the plugin.
        layers: The layers with their statistics.
        weights: Whether the weights are watched too.

    Raises:
        PruneForgeError: Naming `who` did it, and the layer.
    """
    before = [_versions(layer, stats, weights) for layer, stats in layers]
    yield
    for (layer, stats), versions in zip(layers, before, strict=True):
        for name, version in _versions(layer, stats, weights).items():
            if version != versions[name]:
                raise PruneForgeError(f"{who} changed {name} of layer {layer.name!r} in place; it must work on a copy")


def seed_for(seed: int, name: str, device: torch.device, part: int = 0) -> None:
    """Seed random numbers for what a part of a run does with a layer or block."""
    seed_random_numbers(seed * 0x9E3779B1 + zlib.crc32(name.encode()) + 0x85EBCA6B * part, device)


def named(who: str, where: str, work: Callable[[], T]) -> T:
    """Return what a plugin's code gives; an error of any kind becomes one line that names the plugin.

    Raises:
        PruneForgeError: The plugin fails.
    """
    try:
        return work()
    except PruneForgeError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way
        if is_full_memory(error):  # maybe not the plugin's doing: smaller batches are tried, and the run can go on
            error.add_note(f"in {who} {where}")
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        raise PruneForgeError(f"{who} failed {where}: {reason}") from error


def check_pruned(layer: Layer, pruned: Pruned, pattern: Pattern | None, who: str, permutes: bool = False) -> None:
    """Raise unless a mask fits the layer's pattern and the weights are finite in the layer's dtype.

    Args:
        layer: The layer.
        pruned: The mask and maybe weights.
        pattern: What the mask has to fit; `None` for comparison groups that are checked otherwise.
        who: What messages call the plugin that made them.
        permutes: Whether it says that it permutes columns.

    Raises:
        PruneForgeError: Naming the plugin and the layer.
    """
    if not isinstance(pruned, Pruned):
        raise PruneForgeError(f"{who} returned {type(pruned).__name__} for layer {layer.name!r}; it must return Pruned")
    if not isinstance(pruned.notes, tuple | list) or not all(isinstance(note, str) for note in pruned.notes):
        raise PruneForgeError(f"{who} gave notes for layer {layer.name!r} that are not a tuple of texts")
    mask, device = pruned.mask, layer.parameter.device
    for what, tensor in (("a mask", mask), ("weights", pruned.weight), ("a permutation", pruned.permutation)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.device != device):
            what_it_is = f"a tensor on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PruneForgeError(
                f"{who} made {what} for layer {layer.name!r} as {what_it_is}; it must be a tensor on {device}"
            )
    if mask is None or mask.dtype != torch.bool or mask.shape != layer.shape:
        made = "nothing" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        raise PruneForgeError(f"{who} made a mask of {made} for layer {layer.name!r}; it must be boolean {layer.shape}")
    _check_permutation(layer, pruned.permutation, who, permutes)
    if pattern is not None and not pruned.fits(pattern):
        raise PruneForgeError(f"{who} made a mask for layer {layer.name!r} that does not fit {pattern}")
    if pruned.weight is not None:
        if pruned.weight.shape != layer.shape:
            raise PruneForgeError(f"{who} made weights of {tuple(pruned.weight.shape)} for layer {layer.name!r}")
        if not all_finite(pruned.weight.to(layer.parameter.dtype)):
            if all_finite(pruned.weight):
                dtype = layer.parameter.dtype
                raise PruneForgeError(f"{who} made weights in layer {layer.name!r} that are too large for {dtype}")
            raise PruneForgeError(f"{who} made non-finite weights in layer {layer.name!r}")


def _check_permutation(layer: Layer, permutation: Tensor | None, who: str, permutes: bool) -> None:
    """Raise unless there is a permutation of a layer's columns, or none, as the plugin says."""
    if (permutation is not None) != permutes:
        made = "gave no permutation for" if permutes else "permuted the columns of"
        raise PruneForgeError(f"{who} {made} layer {layer.name!r}, and its `permutes` is {permutes}")
    if permutation is not None:
        columns = torch.arange(layer.shape[1], device=permutation.device)
        if permutation.dtype != torch.int64 or not torch.equal(permutation.sort().values, columns):
            raise PruneForgeError(
                f"{who} made a permutation of {permutation.dtype} {tuple(permutation.shape)} for layer {layer.name!r}; "
                f"it must have each of 0 to {layer.shape[1] - 1} once, in int64"
            )


def check_share(run: Run, layers: Sequence[Layer], masks: Mapping[str, Tensor], of: str) -> None:
    """Raise if a method with comparison groups of its own prunes far fewer or more weights than asked for.

    Args:
        run: The run.
        layers: The layers over which it decides together.
        masks: Their masks, by name, on the CPU, where counting makes no device wait.
        of: What messages call them.

    Raises:
        PruneForgeError: Naming them.
    """
    patterns = [run.pattern_for(layer) for layer in layers]
    if run.metric.scope is not None or run.scope in ("block", "model") or not isinstance(run.pattern, Unstructured):
        return
    total = sum(layer.size for layer in layers)
    asked = sum(pattern.sparsity * layer.size for pattern, layer in zip(patterns, layers, strict=True)) / total
    pruned = total - sum(int(masks[layer.name].count_nonzero()) for layer in layers)
    # Each group, of a column or more, rounds down.
    least = LEAST_OF_ASKED * asked * total - sum(layer.shape[1] for layer in layers)
    most = total - LEAST_OF_ASKED * (1 - asked) * total
    if not least <= pruned <= most:
        raise PruneForgeError(
            f"metric {run.metric.name!r} pruned {pruned / total:.1%} of {of}, where {asked:.1%} was asked for"
        )


def _versions(layer: Layer, stats: LayerStatistics, weights: bool) -> dict[str, Any]:
    """Return what tells whether the weight, or a statistic, was changed in place since."""
    versions: dict[str, Any] = (
        {"the weight": (_version(layer.parameter), _checksum(layer.parameter))} if weights else {}
    )
    for kind, statistic in stats.items():
        versions[f"statistic {kind.__name__}"] = _version(statistic.total)
    return versions


def _checksum(parameter: Tensor) -> int:
    """Return the CRC-32 of a parameter's bytes, which also tells of changes that torch does not count, through `.data`.

    On the CPU alone: with a device the host would wait for it at each layer.
    """
    if parameter.device.type != "cpu":
        return 0
    return zlib.crc32(as_bytes(parameter).numpy().data)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
