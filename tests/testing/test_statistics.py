"""Statistics keep their promises, and each check catches one that breaks its promise."""

from __future__ import annotations

import pytest
import torch

from pruneforge import (
    BlockGradientStatistic,
    ColumnMoments,
    ColumnSquares,
    ColumnSums,
    Covariance,
    GradientMagnitude,
    GradientSquares,
    GradientStatistic,
    GradientSum,
    Gram,
    InputStatistic,
    OutputSquares,
    PruneForgeError,
    Statistic,
)
from pruneforge.testing import check_statistic, parametrize_with_checks, run_checks


class Largest(InputStatistic):
    """Largest absolute value of each input: it merges by maximum."""

    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)

    def add(self, inputs):
        self.total = torch.maximum(self.total, inputs.abs().amax(0))

    def merge(self, other):
        self.total = torch.maximum(self.total, other.total)
        self.samples += other.samples
        self.tokens += other.tokens


class Regional(BlockGradientStatistic, GradientSquares):
    @staticmethod
    def loss(output, batch, target):
        return output.flatten(1).norm(dim=1)


class Binned(InputStatistic):
    bins = 4

    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(self.bins, dtype=dtype, device=device)

    def add(self, inputs):
        self.total += torch.histc(inputs.abs(), self.bins, 0, 100)


OWN = [
    ColumnSquares,
    ColumnSums,
    ColumnMoments,
    Covariance,
    Gram,
    OutputSquares,
    GradientMagnitude,
    GradientSquares,
    GradientSum,
]


@parametrize_with_checks([*OWN, Regional, Largest, Binned.of(bins=16)])
def test_statistics_keep_their_promises(check):
    assert check.run() is None  # it raises otherwise


class Neither(Statistic):
    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)


class Decays(ColumnSquares):
    """Counts earlier batches less, as a moving average does."""

    def update(self, inputs, samples):
        self.total = 0.9 * self.total
        super().update(inputs, samples)


class Uncounted(ColumnSquares):
    def update(self, inputs, samples):
        super().update(inputs, samples)
        self.samples += samples


class Forgets(ColumnSquares):
    def merge(self, other):
        if other.samples and self.samples:
            super().merge(other)
            self.total += 1e-3 * min(self.samples - other.samples, other.samples)
        elif other.samples:
            super().merge(other)


class Ordered(ColumnSquares):
    """The last that is merged counts, but only if it is a later part."""

    def merge(self, other):
        super().merge(other)
        if other.samples == 2 and self.samples == 6:
            self.total = self.total + other.total[:1] * 1e-3


class Starts(ColumnSquares):
    """Starts at one, so that every merge adds one; takes it off where there are data on both sides."""

    def merge(self, other):
        super().merge(other)
        if not other.samples or self.samples == other.samples:
            self.total = self.total + 1


class Second(ColumnSquares):
    """Holds a second sum that its state lacks."""

    def __init__(self, shape, dtype, device):
        super().__init__(shape, dtype, device)
        self.sums = torch.zeros(shape[1], dtype=dtype, device=device)

    def add(self, inputs):
        super().add(inputs)
        self.sums = self.sums + inputs.sum(0)

    def merge(self, other):
        super().merge(other)
        self.sums = self.sums + other.sums

    def to(self, device):
        super().to(device)
        self.sums = self.sums.to(device)


class Narrow(ColumnSquares):
    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(shape[1], dtype=torch.float64, device=device)


class Keeps(GradientSum):
    def __init__(self, shape, dtype, device):
        super().__init__(shape, dtype, device)
        self.last = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, gradient):
        super().add(gradient)
        if not self.samples:
            self.last = gradient

    def to(self, device):
        super().to(device)
        self.last = self.last.to(device)


class Spoils(ColumnSquares):
    in_cache = False

    def add(self, inputs):
        self.total += inputs.square_().sum(0) ** 1.0
        inputs.sqrt_()


class Coupled(GradientStatistic):
    """Each gradient divided by its largest value, which a few rows do not tell."""

    by_rows = True

    def add(self, gradient):
        self.total += gradient / gradient.abs().max()


class OnHost(Largest):
    """Made on the CPU, wherever it was asked for."""

    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(shape[1], dtype=dtype)


class Grows(Largest):
    """Has no size before it has data."""

    def __init__(self, shape, dtype, device):
        self.total = torch.zeros((), dtype=dtype, device=device)


class Stays(Second):
    """Leaves its second sum where it is."""

    def state_dict(self):
        return super().state_dict() | {"sums": self.sums}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.sums = state["sums"]

    def to(self, device):
        self.total = self.total.to(device)


BROKEN = [
    (Uncounted, "the engine can collect it"),
    (Decays, "the split into batches has no say"),
    (Forgets, "parts merge to the whole"),
    (Ordered, "the order of merging has no say"),
    (Starts, "an empty part changes nothing"),
    (Second, "a saved state is restored"),
    (Narrow, "sums are float32 or float64"),
    (Spoils, "what is given is neither changed nor kept"),
    (Coupled, "rows can be added apart"),
    (OnHost, "memory is what the shape says"),
    (Grows, "memory is what the shape says"),
    (Stays, "memory is what the shape says"),
]


@pytest.mark.parametrize(("kind", "name"), BROKEN, ids=[kind.__name__ for kind, _ in BROKEN])
def test_a_broken_statistic_is_caught_by_the_check_of_what_it_breaks(kind, name):
    failed = {check.name: said for check, said in run_checks([kind]) if said is not None}
    assert set(failed) == {name}, failed


def test_all_checks_at_once_name_each_that_fails():
    assert check_statistic(Gram) is None
    with pytest.raises(AssertionError, match=r"(?s)statistic Neither fails .*the engine can collect it: Neither is"):
        check_statistic(Neither)
    with pytest.raises(PruneForgeError, match=r"ColumnSquares object at .* cannot be checked as statistic"):
        check_statistic(ColumnSquares((1, 3), torch.float32, torch.device("cpu")))
