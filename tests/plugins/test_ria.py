"""RIA's permutation of columns against what its paper writes."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruneforge import NM, PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.samples import sample


def pruned_by(how, made, pattern):
    metric = loaded_plugins().registry.create("metric", "ria", {"permutation": how})
    stats = made.statistics(metric.requires)
    return metric.score(made.layer(), stats), metric.prune_layer(made.layer(), stats, pattern)


def kept(score, order, pattern):
    """The sum of the N largest scores of each group of columns, row by row, and which these are."""
    total, places = 0.0, set()
    for i, row in enumerate(score):
        for start in range(0, len(order), pattern.m):
            group = sorted(order[start : start + pattern.m], key=lambda j: row[j])[pattern.m - pattern.n :]
            total += sum(row[j] for j in group)
            places |= {(i, j) for j in group}
    return total, places


def dealt(score, pattern):
    """Columns in runs of ascending sums, dealt to the groups forwards and backwards."""
    columns = sorted(range(len(score[0])), key=lambda j: sum(row[j] for row in score))
    size = len(columns) // pattern.m
    runs = [columns[t * size : (t + 1) * size] for t in range(pattern.m)]
    runs = [run[::-1] if t % 2 else run for t, run in enumerate(runs)]
    return [run[g] for g in range(size) for run in runs]


def assigned(score, order, pattern):
    """Every assignment of the columns of a place to the groups is tried, and the best one taken; place by place."""
    groups = len(order) // pattern.m
    for place in range(pattern.m):
        columns = [order[g * pattern.m + place] for g in range(groups)]
        tried = []
        for taken in itertools.permutations(columns):
            other = list(order)
            other[place :: pattern.m] = taken
            tried.append((kept(score, other, pattern)[0], other))
        order = max(tried, key=lambda each: each[0])[1]
    return order


@pytest.mark.parametrize("how", ["snake", "assignment"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 3), NM(3, 6)], ids=str)
def test_columns_are_permuted_as_the_paper_writes(how, pattern):
    for seed in range(4):
        score, found = pruned_by(how, sample((6, 12), seed=seed), pattern)
        score = score.tolist()
        order = dealt(score, pattern)
        if how == "assignment":
            order = assigned(score, order, pattern)
        total, places = kept(score, order, pattern)
        assert {(i, j) for i, j in itertools.product(range(6), range(12)) if found.mask[i, j]} == places
        assert kept(score, found.permutation.tolist(), pattern)[0] == pytest.approx(total, rel=1e-12)
        if how == "snake":
            assert found.permutation.tolist() == order
        assert found.fits(pattern)
        assert found.mask.sum() == 6 * 12 * pattern.n / pattern.m


def total_of(how, made, pattern):
    score, found = pruned_by(how, made, pattern)
    return float((score * found.mask).sum(dtype=torch.float64))


@given(st.integers(0, 10_000), st.sampled_from([NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 3)]), st.booleans())
def test_assignment_keeps_at_least_what_snake_keeps(seed, pattern, narrow):
    made = sample((5, 24), torch.float32 if narrow else torch.float64, seed)
    assert total_of("assignment", made, pattern) >= total_of("snake", made, pattern) * (1 - 1e-12)


def test_permutations_keep_more_of_a_layer_whose_important_columns_are_neighbours():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:, :8] *= 10
    made = sample((16, 32), weight=weight)
    none, snake, assignment = (total_of(how, made, NM(2, 4)) for how in ("none", "snake", "assignment"))
    assert none < snake < assignment


def test_snake_may_keep_less_than_no_permutation():
    totals = [[total_of(how, sample((4, 8), seed=s), NM(2, 4)) for how in ("none", "snake")] for s in range(20)]
    assert any(snake < none for none, snake in totals)
    assert any(snake > none for none, snake in totals)


def test_equal_columns_are_dealt_in_the_order_of_their_index():
    made = sample((4, 8), weight=torch.ones(4, 8), inputs=torch.eye(8).expand(6, 8, 8))
    for how in ("snake", "assignment"):
        assert pruned_by(how, made, NM(2, 4))[1].permutation.tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_the_assignment_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # as where it is not installed
    with pytest.raises(PruneForgeError, match="needs scipy, which is not installed; install the extra 'permutation'"):
        loaded_plugins().registry.create("metric", "ria", {"permutation": "assignment"})
    assert loaded_plugins().registry.create("metric", "ria", {"permutation": "snake"}).permutes
