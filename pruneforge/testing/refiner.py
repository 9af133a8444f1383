"""What every refiner promises."""

from __future__ import annotations

import torch

from pruneforge.interfaces.metric import Pruned
from pruneforge.interfaces.patterns import NM, Pattern, Unstructured
from pruneforge.interfaces.refiner import Refiner
from pruneforge.numerics import all_finite, seed_random_numbers
from pruneforge.testing.kit import Kit, by_name
from pruneforge.testing.samples import Sample, nothing_changed, sample

PATTERNS: tuple[Pattern, ...] = (Unstructured(0.5), Unstructured(0.37, "layer"), NM(2, 4), NM(4, 8))


def refine(refiner: Refiner, made: Sample, pattern: Pattern, parts: int = 1) -> Pruned:
    """Refine a mask by magnitude as the engine does: seeded, without gradients."""
    start = Pruned(pattern.select(made.layer().weight.abs()))
    seed_random_numbers(0, torch.device("cpu"))
    with torch.no_grad():
        return refiner.refine(made.layer(), made.statistics(refiner.requires, parts), start, pattern)


def refined_masks_fit_the_pattern(refiner: Refiner) -> None:
    """Check dtype, shape and count, at several patterns."""
    for pattern in PATTERNS:
        refined = refine(refiner, sample(), pattern)
        assert refined.mask.dtype == torch.bool, f"the mask is {refined.mask.dtype}"
        assert refined.mask.shape == (12, 32), f"the mask is {tuple(refined.mask.shape)}, the weight (12, 32)"
        assert pattern.fits(refined.mask), f"the mask does not fit {pattern}"
        assert refined.weight is None or all_finite(refined.weight), "a weight is not finite"


def the_same_twice(refiner: Refiner) -> None:
    """Check that nothing but the seeded random numbers of torch, numpy and Python varies."""
    first, second = (refine(refiner, sample(), PATTERNS[0]) for _ in range(2))
    assert torch.equal(first.mask, second.mask), "two calls give two masks"


def narrow_dtypes_work(refiner: Refiner) -> None:
    """Check float32, bfloat16 and float16."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        refined = refine(refiner, sample(dtype=dtype), PATTERNS[0])
        assert PATTERNS[0].fits(refined.mask), f"the mask does not fit {PATTERNS[0]} in {dtype}"


def the_split_into_batches_has_no_say(refiner: Refiner) -> None:
    """Check that merged statistics of several batches, or processes, do as well as those of one."""
    whole, parts = (refine(refiner, sample(), PATTERNS[0], parts).mask for parts in (1, 3))
    assert torch.equal(whole, parts), "statistics of three batches, merged, give another mask than those of one"


def nothing_given_is_changed(refiner: Refiner) -> None:
    """Check that the weight, the mask and the statistics are not changed in place."""
    made, pattern = sample(), PATTERNS[0]
    layer, stats = made.layer(), made.statistics(refiner.requires)
    start = Pruned(pattern.select(layer.weight.abs()))
    with torch.no_grad(), nothing_changed(layer, stats, mask=start.mask):
        refiner.refine(layer, stats, start, pattern)


KIT = Kit(
    by_name(
        refined_masks_fit_the_pattern,
        the_same_twice,
        narrow_dtypes_work,
        the_split_into_batches_has_no_say,
        nothing_given_is_changed,
    )
)
