"""SparseFW against the steps of Frank and Wolfe, written out one entry at a time."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import NM, Pruned, Unstructured
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.samples import sample

PATTERNS = [Unstructured(0.5), Unstructured(0.6, "layer"), NM(2, 4), NM(3, 8)]


def refined(data, start, pattern, **options):
    refiner = loaded_plugins().registry.create("refiner", "sparsefw", options)
    return refiner.refine(data.layer(), data.statistics(refiner.requires), Pruned(start), pattern).mask


def row_errors(data, mask):
    return (data.inputs.flatten(0, 1) @ (data.weight * ~mask).T).square().sum(0)


def groups_of(pattern, rows, columns):
    """The places (row, column) that are compared with each other, and how many of them are kept."""
    if isinstance(pattern, NM):
        return [
            ([(i, j + k) for k in range(pattern.m)], pattern.n)
            for i in range(rows)
            for j in range(0, columns, pattern.m)
        ]
    by_row = [[(i, j) for j in range(columns)] for i in range(rows)]
    groups = by_row if pattern.scope == "row" else [[place for row in by_row for place in row]]
    return [(group, len(group) - math.floor(len(group) * pattern.sparsity + 1e-9)) for group in groups]


def top(places, count, score):
    """Of equal scores, the last by index are kept."""
    return set(sorted(places, key=lambda place: (score[place], place))[len(places) - count :])


def by_the_paper(data, start, pattern, steps, fixed):
    (rows, columns), flat = data.weight.shape, data.inputs.flatten(0, 1)
    gram, w = (flat.T @ flat).tolist(), data.weight.tolist()
    places = [(i, j) for i in range(rows) for j in range(columns)]
    score = {(i, j): abs(w[i][j]) * gram[j][j] ** 0.5 for i, j in places}
    kept = {place for place in places if start[place]}
    whole = not isinstance(pattern, NM) and pattern.scope == "layer"
    stay = set()
    for part in [places] if whole else [[(i, j) for j in range(columns)] for i in range(rows)]:
        count = math.ceil(round(len(part) * fixed * (1 - pattern.sparsity), 9))
        stay |= top([place for place in part if place in kept], count, score)
    relaxed = {place: float(place in kept) for place in places}
    groups = groups_of(pattern, rows, columns)

    def select(score):
        with_fixed = {place: math.inf if place in stay else score[place] for place in places}
        return set().union(*(top(group, count, with_fixed) for group, count in groups))

    for t in range(steps):
        left = {(i, j): w[i][j] * (1 - relaxed[i, j]) for i, j in places}
        descent = {(i, j): 2 * w[i][j] * sum(left[i, k] * gram[k][j] for k in range(columns)) for i, j in places}
        vertex = select(descent)
        relaxed = {p: relaxed[p] + 2 / (t + 2) * ((p in vertex) - relaxed[p]) for p in places}
    chosen = select(relaxed)
    found = torch.tensor([[(i, j) in chosen for j in range(columns)] for i in range(rows)])
    before, after = row_errors(data, start), row_errors(data, found)
    if whole:
        return found if after.sum() < before.sum() else start
    return torch.where((after < before)[:, None], found, start)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsefw_does_what_the_paper_writes(pattern):
    changed = 0
    for seed in range(3):
        data = sample((6, 16), seed=seed)
        start = pattern.select(data.weight.abs())
        for steps, fixed in ((1, 0.9), (2, 0.5), (15, 0.75), (15, 0.0)):
            found = refined(data, start, pattern, steps=steps, fixed=fixed)
            assert torch.equal(found, by_the_paper(data, start, pattern, steps, fixed)), (seed, steps, fixed)
            changed += int((found != start).any())
    assert changed > 3


@pytest.mark.parametrize("pattern", [*PATTERNS, NM(4, 4), Unstructured(0.0)], ids=str)
@pytest.mark.parametrize("fixed", [0.0, 0.9, 1.0])
def test_no_error_rises_and_the_fixed_share_stays(pattern, fixed):
    for seed in range(3):
        data = sample((24, 64), seed=seed)
        start = pattern.select(data.weight.abs())
        found = refined(data, start, pattern, fixed=fixed)
        before, after = row_errors(data, start), row_errors(data, found)
        if isinstance(pattern, NM) or pattern.scope == "row":
            assert (after <= before).all()
        assert after.sum() <= before.sum()
        assert pattern.fits(found)
        assert (found & start).sum() >= fixed * start.sum()
        if pattern.sparsity and fixed == 0.9:
            assert after.sum() < before.sum()


def test_more_steps_come_close_to_the_least_error_of_all_masks():
    """With few columns all masks of a row can be compared."""
    data, pattern = sample((8, 10), seed=2), Unstructured(0.5)
    start = pattern.select(data.weight.abs())
    masks = torch.tensor([[bool(number >> j & 1) for j in range(10)] for number in range(1 << 10)])
    masks = masks[masks.sum(1) == 5]
    best = torch.stack([row_errors(data, mask.expand(8, 10)) for mask in masks]).amin(0)
    found = row_errors(data, refined(data, start, pattern, steps=500, fixed=0.0))
    before = row_errors(data, start)
    assert found.sum() - best.sum() < 0.2 * (before.sum() - best.sum())


def test_weights_that_a_metric_updated_stay_with_their_mask():
    plain = pruneforge.prune(tiny_llama(), "sparsegpt", 0.5, None, tokens().split(3))
    kept = pruneforge.prune(tiny_llama(), "sparsegpt", 0.5, None, tokens().split(3), refine="sparsefw")
    assert all(torch.equal(kept.masks[name], mask) for name, mask in plain.masks.items())
    assert any("its mask was not refined" in warning for warning in kept.report["warnings"])
