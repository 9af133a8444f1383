"""DSnoT against its lists and pointers, written out for one row at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import NM, Pruned, Unstructured
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.samples import sample

PATTERNS = [Unstructured(0.5), Unstructured(0.6, "layer"), NM(2, 4), NM(1, 4), NM(5, 8)]


def made(seed, shape=(6, 24)):
    """A layer whose inputs have means, of either sign, and in one column nothing but zeros."""
    inputs = sample(shape, seed=seed).inputs
    inputs = inputs + torch.linspace(-2, 1.5, shape[1], dtype=torch.float64)
    inputs[..., 3] = 0
    return sample(shape, seed=seed, inputs=inputs)


def refined(data, start, pattern, **options):
    refiner = loaded_plugins().registry.create("refiner", "dsnot", options)
    return refiner.refine(data.layer(), data.statistics(refiner.requires), Pruned(start), pattern).mask


def mean_errors(data, mask):
    """Of each row, what the pruned weights put out, summed over tokens, for a sample in the mean."""
    return (data.inputs @ (data.weight * ~mask).T).sum(1).mean(0)


def by_the_paper(data, start, pattern, cycles, threshold, same_sign):
    columns = data.weight.shape[1]
    flat = data.inputs.flatten(0, 1)
    sums = [flat[:, j].sum().item() / len(data.inputs) for j in range(columns)]
    variance = [flat[:, j].var(correction=0).item() for j in range(columns)]
    norm = [flat[:, j].square().sum().item() ** 0.5 for j in range(columns)]
    found = start.clone()
    for weight, keep in zip(data.weight.tolist(), found, strict=True):
        d = [weight[j] * sums[j] for j in range(columns)]
        score = [abs(weight[j]) * norm[j] for j in range(columns)]
        pruned, kept = [j for j in range(columns) if not keep[j]], [j for j in range(columns) if keep[j]]
        grow = sorted([j for j in pruned if d[j] != 0], key=lambda j: d[j] / variance[j])
        kept.sort(key=lambda j: score[j])
        drop = [j for j in kept if d[j] < 0] + [j for j in kept if d[j] > 0][::-1]
        error = before = sum(d[j] for j in pruned)
        front, back, first, last = 0, len(grow) - 1, 0, len(drop) - 1
        swaps, unmoved = [], set(kept)
        for _ in range(cycles):
            if abs(error) <= threshold or front > back or first > last:
                break
            p = grow[back] if error > 0 else grow[front]
            if (d[p] > 0) != (error > 0):
                break  # nothing is left that helps
            if isinstance(pattern, NM):
                partners = [j for j in kept if j // pattern.m == p // pattern.m and j in unmoved]
                u = partners[0] if partners else None
            else:
                u = drop[first] if error > 0 else drop[last]
                if (d[u] > 0) == (error > 0):
                    break
            after = error + d[u] - d[p] if u is not None else error
            if (same_sign or isinstance(pattern, NM)) and (after > 0) != (error > 0):
                break
            if error > 0:
                back, first = back - 1, first + (not isinstance(pattern, NM))
            else:
                front, last = front + 1, last - (not isinstance(pattern, NM))
            if u is not None:
                swaps.append((p, u))
                unmoved.remove(u)
            error = after
        if abs(error) <= abs(before):
            for p, u in swaps:
                keep[p], keep[u] = True, False
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("same_sign", [False, True])
def test_dsnot_swaps_what_the_paper_writes(pattern, same_sign):
    changed = 0
    for seed in range(6):
        data = made(seed)
        start = pattern.select(data.weight.abs())
        for cycles, threshold in ((50, 0.1), (1, 0.1), (3, 0.0), (50, 8.0)):
            found = refined(data, start, pattern, cycles=cycles, threshold=threshold, same_sign=same_sign)
            assert torch.equal(found, by_the_paper(data, start, pattern, cycles, threshold, same_sign))
            changed += int((found != start).any(1).sum())
    assert changed > 20


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("same_sign", [False, True])
def test_the_mean_error_of_a_row_never_rises_and_its_counts_stay(pattern, same_sign):
    for seed in range(5):
        data = made(seed, (40, 64))
        start = pattern.select(data.weight.abs())
        found = refined(data, start, pattern, same_sign=same_sign)
        before, after = mean_errors(data, start), mean_errors(data, found)
        assert (after.abs() <= before.abs() + 1e-9).all()
        assert after.abs().sum() < 0.7 * before.abs().sum()
        assert torch.equal(found.sum(1), start.sum(1))
        assert pattern.fits(found)
        assert (found & ~start).sum(1).max() <= 50
        if same_sign or isinstance(pattern, NM):
            assert (after.sign() == before.sign()).all()


def test_rows_within_the_threshold_stay():
    data, pattern = made(0), Unstructured(0.5)
    start = pattern.select(data.weight.abs())
    middle = mean_errors(data, start).abs().median().item() + 1e-9
    found = refined(data, start, pattern, threshold=middle)
    within = mean_errors(data, start).abs() <= middle
    assert torch.equal(found[within], start[within])
    assert (found[~within] != start[~within]).any(1).all()


def test_a_model_is_refined_and_weights_that_a_metric_updated_stay_with_their_mask():
    wanda, refined = (
        pruneforge.prune(tiny_llama(), "wanda", 0.5, None, tokens().split(3), refine=refine)
        for refine in (None, "dsnot")
    )
    assert any(not torch.equal(refined.masks[name], mask) for name, mask in wanda.masks.items())
    plain = pruneforge.prune(tiny_llama(), "sparsegpt", 0.5, None, tokens().split(3))
    kept = pruneforge.prune(tiny_llama(), "sparsegpt", 0.5, None, tokens().split(3), refine="dsnot")
    assert all(torch.equal(kept.masks[name], mask) for name, mask in plain.masks.items())
    assert any("its mask was not refined" in warning for warning in kept.report["warnings"])
