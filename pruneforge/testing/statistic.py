"""What every class of statistics promises."""

from __future__ import annotations

import io
from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from pruneforge.interfaces.statistics import GradientStatistic, InputStatistic, OutputStatistic, Statistic
from pruneforge.numerics import accumulation_dtype
from pruneforge.testing.kit import Kit, by_name
from pruneforge.testing.samples import SAMPLES, TOKENS, Sample, sample

SHAPE = (12, 32)
CPU, META = torch.device("cpu"), torch.device("meta")
Kind = type[Statistic]


def empty(kind: Kind, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Statistic:
    """Return a statistic as the engine makes it for a layer of `dtype`."""
    return kind(SHAPE, accumulation_dtype(dtype), device)


def collected(kind: Kind, *parts: Iterable[int], made: Sample | None = None) -> Statistic:
    """Return a statistic of samples, each part of them in a batch of its own; by default of all, in one batch."""
    made = made or sample(SHAPE)
    statistic = empty(kind, made.weight.dtype)
    for part in parts or [range(SAMPLES)]:
        made.collect(statistic, torch.tensor([*part]))
    return statistic


def contents(statistic: Statistic) -> dict[str, Any]:
    """Return copies of what a statistic says: its saved state, and what else is public."""
    values = {name: value for name, value in vars(statistic).items() if not name.startswith("_")}
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in {**values, **statistic.state_dict(), "total": statistic.total}.items()
    }


def assert_alike(found: Statistic, expected: Statistic, said: str) -> None:
    """Assert that two statistics say the same, to the tolerance of float64 sums."""
    one, two = contents(found), contents(expected)
    assert one.keys() == two.keys(), f"{said}: one has {', '.join(sorted(one.keys() ^ two.keys()))} and one has not"
    for name, value in one.items():
        if isinstance(value, Tensor):
            same = value.shape == two[name].shape and torch.allclose(value, two[name], rtol=1e-9, atol=1e-9)
            assert same, f"{said}: {name} differs"
        else:
            assert value == two[name], f"{said}: {name} is {value!r} and {two[name]!r}"


def the_engine_can_collect_it(kind: Kind) -> None:
    """Check the base class, and that the data are counted."""
    assert issubclass(kind, InputStatistic | OutputStatistic | GradientStatistic), (
        f"{kind.__name__} is none of InputStatistic, OutputStatistic and GradientStatistic"
    )
    statistic = collected(kind)
    tokens = 0 if isinstance(statistic, GradientStatistic) else SAMPLES * TOKENS
    assert (statistic.samples, statistic.tokens) == (SAMPLES, tokens), (
        f"{SAMPLES} samples of {tokens} tokens are counted as {statistic.samples} of {statistic.tokens}"
    )


def the_split_into_batches_has_no_say(kind: Kind) -> None:
    """Check that one batch and several give the same."""
    assert_alike(collected(kind, [0], [1, 2, 3], [4, 5]), collected(kind), "three batches and one")


def parts_merge_to_the_whole(kind: Kind) -> None:
    """Check that statistics of two halves merge to the one of all samples."""
    first, second = collected(kind, [0, 1]), collected(kind, [2, 3, 4, 5])
    first.merge(second)
    assert_alike(first, collected(kind), "two parts, merged, and the whole")


def the_order_of_merging_has_no_say(kind: Kind) -> None:
    """Check that three parts merge to the same in any order, as processes may finish in any."""

    def merged(*order: int) -> Statistic:
        parts = [collected(kind, [2 * index, 2 * index + 1]) for index in order]
        for part in parts[1:]:
            parts[0].merge(part)
        return parts[0]

    assert_alike(merged(2, 0, 1), merged(0, 1, 2), "parts that are merged in two orders")


def an_empty_part_changes_nothing(kind: Kind) -> None:
    """Check merging with a statistic that has received nothing, as a process without batches has."""
    whole, nothing = collected(kind), empty(kind)
    whole.merge(empty(kind))
    assert_alike(whole, collected(kind), "with an empty statistic merged into it, and without")
    nothing.merge(collected(kind))
    assert_alike(nothing, collected(kind), "merged into an empty statistic, and as it was")


def a_saved_state_is_restored(kind: Kind) -> None:
    """Check that a state that was written and read goes on as if nothing had happened, whatever it is read into."""
    original, file = collected(kind, [0, 1, 2]), io.BytesIO()
    torch.save(original.state_dict(), file)
    restored = kind((0, 0), torch.float32, CPU)  # as the cache of gradients does
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_alike(restored, original, "restored from `state_dict` and the original")
    for statistic in (restored, original):
        sample(SHAPE).collect(statistic, torch.tensor([3, 4, 5]))
    assert_alike(restored, original, "restored and added to, and the original")


def sums_are_float32_or_float64(kind: Kind) -> None:
    """Check that sums are in the dtype that the engine asks for, whatever the model's dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        wanted = accumulation_dtype(dtype)
        for name, value in contents(collected(kind, made=sample(SHAPE, dtype))).items():
            narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != wanted
            assert not narrow, f"{name} is {value.dtype} in a {dtype} model; it must be {wanted}"


def what_is_given_is_neither_changed_nor_kept(kind: Kind) -> None:
    """Check that tensors that are added stay as they are, and that their memory can be used again."""
    made = sample(SHAPE)
    statistic = empty(kind)
    given = made.gradients[0]
    if isinstance(statistic, InputStatistic):
        given = made.inputs.flatten(0, 1)
    elif isinstance(statistic, OutputStatistic):
        given = made.outputs.flatten(0, 1)
    before = given.clone()
    if isinstance(statistic, InputStatistic | OutputStatistic):
        statistic.update(given, SAMPLES)
    elif isinstance(statistic, GradientStatistic):
        statistic.add(given)
    assert torch.equal(given, before), "a tensor that is added is changed in place; work on a copy"
    held = contents(statistic)
    given.fill_(7.0)
    changed = [n for n, v in contents(statistic).items() if isinstance(v, Tensor) and not torch.equal(v, held[n])]
    assert not changed, f"{', '.join(changed)} changes with a tensor that was added and is used again"


def rows_can_be_added_apart(kind: Kind) -> None:
    """Check, where `by_rows` says so, that gradients can be added a few rows at a time."""
    if not issubclass(kind, GradientStatistic) or not kind.by_rows:
        return
    made, statistic = sample(SHAPE), empty(kind)
    assert isinstance(statistic, GradientStatistic)
    for rows in (slice(0, 5), slice(5, 6), slice(6, SHAPE[0])):
        part = statistic.part(rows)
        for gradient in made.gradients:
            part.add(gradient[rows])
    statistic.samples = SAMPLES
    assert_alike(statistic, collected(kind), "added a few rows at a time, and whole")


def memory_is_what_the_shape_says(kind: Kind) -> None:
    """Check that it can be made without memory, of the size that it has after data, and moves between devices whole."""
    planned = _tensors(empty(kind, device=META))
    on_device = [name for name, value in planned.items() if not value.is_meta]
    assert not on_device, f"{', '.join(on_device)} is not made on the device that was asked for"
    statistic = collected(kind)
    for name, value in _tensors(statistic).items():
        size = tuple(planned[name].shape) if name in planned else None
        assert size == tuple(value.shape), f"{name} has the shape {tuple(value.shape)} with data, and {size} before"
    moved = copy(statistic)
    moved.to(META)
    left = [name for name, value in _tensors(moved).items() if not value.is_meta]
    assert not left, f"`to` leaves {', '.join(left)} on another device"


def _tensors(statistic: Statistic) -> dict[str, Tensor]:
    return {name: value for name, value in contents(statistic).items() if isinstance(value, Tensor)}


KIT = Kit(
    by_name(
        the_engine_can_collect_it,
        the_split_into_batches_has_no_say,
        parts_merge_to_the_whole,
        the_order_of_merging_has_no_say,
        an_empty_part_changes_nothing,
        a_saved_state_is_restored,
        sums_are_float32_or_float64,
        what_is_given_is_neither_changed_nor_kept,
        rows_can_be_added_apart,
        memory_is_what_the_shape_says,
    )
)
