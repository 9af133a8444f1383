"""What every metric promises."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from pruneforge.interfaces.metric import Metric, Pruned, measures_scores, scores_layers
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.patterns import NM, Pattern, Unstructured, pruned_count
from pruneforge.interfaces.selection import smallest
from pruneforge.interfaces.statistics import LayerStatistics, Statistic
from pruneforge.numerics import all_finite, seed_random_numbers
from pruneforge.testing.kit import Kit, by_name
from pruneforge.testing.metric_on_models import (
    batches_of_a_model_have_no_say,
    every_scope_it_allows_works,
    whole_models_are_pruned_as_asked_for,
)
from pruneforge.testing.samples import Sample, nothing_changed, sample

HALF = 0.5


def scores(metric: Metric) -> bool:
    """Return whether a metric scores, rather than pruning layers for itself."""
    return scores_layers(metric)


def prune(metric: Metric, made: Sample, pattern: Pattern, parts: int = 1) -> Pruned:
    """Prune a sample as the engine does: seeded, without gradients."""
    seed_random_numbers(0, made.weight.device)
    with torch.no_grad():
        return metric.prune_layer(made.layer(), made.statistics(metric.requires, parts), pattern)


def asked_for(metric: Metric, sparsity: float = HALF) -> Pattern:
    """Return the pattern that the engine would ask the metric for: unstructured, unless it permutes for N:M."""
    if metric.permutes:
        return NM(round(4 * (1 - sparsity)), 4)
    scope = metric.comparison_group() or "layer"
    return Unstructured(sparsity, "layer" if scope in ("block", "model") else scope)


def patterns(metric: Metric) -> Iterator[Pattern]:
    """Yield patterns of every kind."""
    for sparsity in () if metric.permutes else (0.0, 0.37, HALF, 0.97):
        yield asked_for(metric, sparsity)
    yield from (NM(2, 4), NM(4, 8), NM(1, 4))


def masks_are_boolean_and_of_the_weight_s_shape(metric: Metric) -> None:
    """Check dtype, shape and device of the mask and of an updated weight."""
    pruned = prune(metric, sample(), asked_for(metric))
    assert pruned.mask.dtype == torch.bool, f"the mask is {pruned.mask.dtype}"
    assert pruned.mask.shape == (12, 32), f"the mask is {tuple(pruned.mask.shape)}, the weight (12, 32)"
    assert pruned.mask.device == torch.device("cpu"), f"the mask is on {pruned.mask.device}, the weight on the CPU"
    if pruned.weight is not None:
        assert pruned.weight.shape == (12, 32), f"the new weight is {tuple(pruned.weight.shape)}"


def exactly_as_many_weights_are_pruned_as_asked_for(metric: Metric) -> None:
    """Check the count at several sparsities and N:M patterns."""
    for pattern in patterns(metric):
        _check_count(metric, sample(), pattern)


def ties_change_no_count(metric: Metric) -> None:
    """Check the count where all scores are equal."""
    equal = torch.ones(12, 32)
    made = sample(weight=equal, inputs=torch.ones(6, 16, 32), gradients=torch.ones(6, 12, 32))
    for pattern in (asked_for(metric), NM(2, 4)):
        _check_count(metric, made, pattern)


def _check_count(metric: Metric, made: Sample, pattern: Pattern) -> None:
    pruned = prune(metric, made, pattern)
    if metric.scope is None and isinstance(pattern, Unstructured):  # its own groups round down
        reached = 1 - pruned.mask.double().mean().item()
        assert 0.85 * pattern.sparsity <= reached <= pattern.sparsity + 0.05, f"{pattern}: {reached:.1%} is pruned"
    else:
        assert pruned.fits(pattern), f"the mask does not fit {pattern}"


def nothing_pruned_leaves_the_weights(metric: Metric) -> None:
    """Check sparsity 0."""
    made = sample()
    pruned = prune(metric, made, asked_for(metric, 0.0))
    assert pruned.mask.all(), "weights are pruned at sparsity 0"
    if pruned.weight is not None:
        assert torch.allclose(pruned.weight, made.weight, atol=1e-8), "weights change although none is pruned"


def results_are_finite(metric: Metric) -> None:
    """Check scores and updated weights."""
    made = sample()
    if scores(metric):
        seed_random_numbers(0, torch.device("cpu"))
        assert all_finite(metric.score(made.layer(), made.statistics(metric.requires))), "a score is not finite"
    weight = prune(metric, made, asked_for(metric)).weight
    assert weight is None or all_finite(weight), "a weight is not finite"


def what_it_measures_is_finite_numbers(metric: Metric) -> None:
    """Check what the metric reports of its scores, where all are equal too, and that lines are made of it."""
    equal = sample(weight=torch.ones(12, 32), inputs=torch.ones(6, 16, 32), gradients=torch.ones(6, 12, 32))
    for made in (sample(), equal) if measures_scores(metric) else ():
        layer, stats = made.layer(), made.statistics(metric.requires)
        seed_random_numbers(0, torch.device("cpu"))
        measured = metric.measure(layer, metric.checked_score(layer, stats), stats)
        numbers = all(isinstance(each, int | float) and isfinite(each) for each in measured.values())
        assert numbers, f"{measured} is not finite numbers by name"
        if measured:
            lines = metric.remarks({layer.name: measured})
            assert all(isinstance(line, str) for line in lines), "remarks are not lines of text"


def dead_inputs_are_no_error(metric: Metric) -> None:
    """Check the count with an input that is always zero, which makes a Gram matrix singular."""
    for pattern in (asked_for(metric), NM(2, 4)):
        _check_count(metric, _with_a_dead_column(), pattern)


def _with_a_dead_column() -> Sample:
    made = sample()
    inputs, gradients = made.inputs.clone(), made.gradients.clone()
    inputs[..., 3], gradients[..., 3] = 0, 0
    return sample(inputs=inputs, gradients=gradients)


def the_same_twice(metric: Metric) -> None:
    """Check that nothing but the seeded random numbers of torch, numpy and Python varies."""
    first, second = (prune(metric, sample(), asked_for(metric)) for _ in range(2))
    assert torch.equal(first.mask, second.mask), "two calls give two masks, though random numbers are seeded alike"
    if first.weight is not None and second.weight is not None:
        assert torch.equal(first.weight, second.weight), "two calls give two weights"


def hashes_have_no_say(metric: Metric) -> None:
    """Check that the hash of a text, which differs between processes, does not change the mask."""
    masks = []
    for salt in ("one process", "another"):
        with _texts_hashed_with(salt):
            masks.append(prune(metric, sample(), asked_for(metric)).mask)
    assert torch.equal(*masks), "masks depend on `hash` of a text, which is another one in each process; use zlib.crc32"


@contextmanager
def _texts_hashed_with(salt: str) -> Iterator[None]:
    """Let `hash` give other values of texts, and of tuples with texts, as with another PYTHONHASHSEED.

    A process of its own would take seconds to import torch.
    """
    plain = builtins.hash

    def has_text(value: object) -> bool:
        return isinstance(value, str | bytes) or (isinstance(value, tuple) and any(map(has_text, value)))

    builtins.hash = lambda value, /: plain((salt, value)) if has_text(value) else plain(value)
    try:
        yield
    finally:
        builtins.hash = plain


def the_order_in_memory_has_no_say(metric: Metric) -> None:
    """Check a weight that lies transposed in memory, as those of some checkpoints do."""
    made = sample()
    transposed = sample(weight=made.weight.T.contiguous().T)
    assert torch.equal(
        prune(metric, made, asked_for(metric)).mask, prune(metric, transposed, asked_for(metric)).mask
    ), "a weight that lies transposed in memory gets another mask"


def narrow_dtypes_work(metric: Metric) -> None:
    """Check float32, bfloat16 and float16."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _check_count(metric, sample(dtype=dtype), asked_for(metric))


def rows_are_pruned_alike(metric: Metric) -> None:
    """Check that permuted output rows get the permuted mask."""
    made, order = sample(), torch.arange(11, -1, -1)
    permuted = sample(weight=made.weight[order], gradients=made.gradients[:, order])
    pattern = asked_for(metric)
    expected, found = prune(metric, made, pattern).mask[order], prune(metric, permuted, pattern).mask
    assert torch.equal(found, expected), "permuting the output rows gives another mask than the permuted one"


def the_split_into_batches_has_no_say(metric: Metric) -> None:
    """Check that merged statistics of several batches, or processes, do as well as those of one."""
    pattern = asked_for(metric)
    whole, parts = (prune(metric, sample(), pattern, parts).mask for parts in (1, 3))
    assert torch.equal(whole, parts), "statistics of three batches, merged, give another mask than those of one"


def weights_and_statistics_are_not_changed(metric: Metric) -> None:
    """Check that nothing given is changed in place: other runs of the pass use it too."""
    made = sample()
    layer, stats = made.layer(), made.statistics(metric.requires)
    seed_random_numbers(0, torch.device("cpu"))
    with torch.no_grad(), nothing_changed(layer, stats):
        metric.prune_layer(layer, stats, asked_for(metric))


def the_statistics_required_are_used(metric: Metric) -> None:
    """Check that every statistic in `requires` is looked at."""
    made = sample()
    watched = _Watched(made.statistics(metric.requires))
    seed_random_numbers(0, torch.device("cpu"))
    with torch.no_grad():
        metric.prune_layer(made.layer(), watched, asked_for(metric))
    unused = [kind.__name__ for kind in metric.requires if kind not in watched.used]
    assert not unused, f"{', '.join(unused)} is required and not used; collecting it costs time and memory"


class _Watched(LayerStatistics):
    """Statistics that note which of them are looked at."""

    def __init__(self, stats: LayerStatistics) -> None:
        super().__init__(dict(stats.items()), {})
        self.used: set[type[Statistic]] = set()

    def __getitem__(self, kind: Any) -> Any:
        self.used.add(kind)
        return super().__getitem__(kind)

    def owned_by(self, part: Configurable) -> LayerStatistics:
        return self  # what a metric's parts look at counts too


def scores_compare_over_several_layers(metric: Metric) -> None:
    """Check the count where several layers are one comparison group."""
    if not scores(metric):
        return
    made = [sample(seed=seed) for seed in range(3)]

    def each() -> Iterator[Tensor]:
        for one in made:
            seed_random_numbers(0, torch.device("cpu"))
            yield metric.checked_score(one.layer(), one.statistics(metric.requires))

    count = pruned_count(sum(one.weight.numel() for one in made), HALF)
    threshold = smallest(each, count)
    pruned = sum(int((~threshold.select(score)).sum()) for score in each())
    assert pruned == count, f"{pruned} weights of three layers are pruned together, where {count} were asked for"


def cuda_gives_the_masks_of_the_cpu(metric: Metric) -> None:
    """Check that masks agree in float64, but for ties within rounding."""
    made, pattern = sample(), asked_for(metric)
    on_device = prune(metric, made.to(torch.device("cuda", torch.cuda.current_device())), pattern).mask
    assert on_device.is_cuda, f"the mask of a weight on CUDA is on {on_device.device}"
    alike = (prune(metric, made, pattern).mask == on_device.cpu()).double().mean().item()
    assert alike >= 0.99, f"{1 - alike:.1%} of a mask differ between CUDA and the CPU"


def _without_cuda() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


KIT = Kit(
    by_name(
        masks_are_boolean_and_of_the_weight_s_shape,
        exactly_as_many_weights_are_pruned_as_asked_for,
        ties_change_no_count,
        nothing_pruned_leaves_the_weights,
        results_are_finite,
        what_it_measures_is_finite_numbers,
        dead_inputs_are_no_error,
        the_same_twice,
        the_order_in_memory_has_no_say,
        narrow_dtypes_work,
        rows_are_pruned_alike,
        the_split_into_batches_has_no_say,
        weights_and_statistics_are_not_changed,
        the_statistics_required_are_used,
        scores_compare_over_several_layers,
        hashes_have_no_say,
        whole_models_are_pruned_as_asked_for,
        every_scope_it_allows_works,
        batches_of_a_model_have_no_say,
        cuda_gives_the_masks_of_the_cpu,
    ),
    skips={"cuda gives the masks of the cpu": _without_cuda},
)
