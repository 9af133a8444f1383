"""Selection prunes exactly k, ties by index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneforge import PruneForgeError
from pruneforge.interfaces import selection
from pruneforge.interfaces.patterns import NM, Unstructured, parse_pattern, pruned_count
from pruneforge.interfaces.selection import prune_smallest, prune_smallest_of_all, smallest

# Few distinct values, so that ties are the rule; both zeros, and the extremes of the range.
values = st.sampled_from([-0.0, 0.0, 1.0, 2.0, -1.0, 1e-45, 3e38, 0.5])
dtypes = st.sampled_from([torch.float32, torch.float64])


def by_sorting(row: torch.Tensor, count: int) -> torch.Tensor:
    """The mask by a stable sort of Python numbers."""
    order = sorted(range(len(row)), key=lambda i: (row[i].item(), i))
    keep = torch.ones(len(row), dtype=torch.bool)
    keep[order[:count]] = False
    return keep


@given(st.lists(values, min_size=1, max_size=40), st.integers(0, 40), dtypes)
def test_rows_are_pruned_exactly_with_ties_by_index(row, count, dtype):
    scores = torch.tensor([row, row[::-1]], dtype=dtype)
    count = min(count, len(row))
    mask = prune_smallest(scores, count)
    for got, given_row in zip(mask, scores, strict=True):
        assert torch.equal(got, by_sorting(given_row, count))


@given(st.lists(values, min_size=1, max_size=12), st.integers(0, 36), dtypes, st.booleans())
def test_a_layer_is_pruned_exactly_with_ties_by_index_however_it_lies_in_memory(row, count, dtype, transposed):
    scores = torch.tensor([row, row[::-1], row], dtype=dtype)
    count = min(count, scores.numel())
    mask = prune_smallest_of_all(scores.T.contiguous().T if transposed else scores, count)
    assert torch.equal(mask.flatten(), by_sorting(scores.flatten(), count))


@settings(deadline=None)
@given(st.lists(st.lists(values, min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 80), dtypes)
def test_threshold_over_several_tensors_equals_one_sort(rows, count, dtype):
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    everything = torch.cat(tensors)
    count = min(count, len(everything))
    for keys in (selection.KEYS, 3):  # all of them together, and a few at a time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "KEYS", keys)
            threshold = smallest(lambda: tensors, count)
        mask = torch.cat([threshold.select(tensor) for tensor in tensors])
        assert torch.equal(mask, by_sorting(everything, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_over_many_distinct_scores_is_exact(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(300, 7, dtype=dtype) * 10.0**e for e in (-20, 0, 20)]
    ordered = torch.cat([t.flatten() for t in tensors]).sort().values
    for count in (1, 17, 3150, len(ordered)):
        threshold = smallest(lambda: tensors, count)
        assert threshold.value == ordered[count - 1].item()
        assert threshold.ties == 1


@given(
    st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 3), (5, 7), (8, 16), (2, 12)]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_every_group_keeps_its_n_largest(pattern, rows, groups, random):
    n, m = pattern
    scores = torch.tensor([[random.choice([0.0, 1.0, 2.0, 3.0]) for _ in range(m * groups)] for _ in range(rows)])
    mask = NM(n, m).select(scores)
    for got, group in zip(mask.reshape(-1, m), scores.reshape(-1, m), strict=True):
        assert torch.equal(got, by_sorting(group, m - n))


@settings(deadline=None)
@given(st.sampled_from([0.0, 1e-6, 0.29, 0.5, 0.7, 0.999, 1 - 1e-9]), st.sampled_from(["row", "layer"]))
def test_sparsity_is_exact_even_if_all_scores_tie(sparsity, scope):
    mask = Unstructured(sparsity, scope).select(torch.zeros(7, 100))
    count = pruned_count(100, sparsity) * 7 if scope == "row" else pruned_count(700, sparsity)
    assert (~mask).sum().item() == count


@pytest.mark.parametrize(
    ("total", "sparsity", "count"),
    [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.001, 1), (4096, 0.5, 2048), (10, 0.999, 9), (7, 0.0, 0), (3, 1 / 3, 0)],
)
def test_counts_do_not_suffer_from_binary_fractions(total, sparsity, count):
    assert pruned_count(total, sparsity) == count


def test_two_to_four_is_half_by_default():
    assert parse_pattern(None, "2:4", "row") == NM(2, 4)
    assert parse_pattern(0.5, "2:4", "row") == NM(2, 4)
    assert parse_pattern(None, None, "row") == Unstructured(0.5, "row")
    assert parse_pattern(0.3, "unstructured", "layer") == Unstructured(0.3, "layer")


@pytest.mark.parametrize(
    ("sparsity", "pattern", "said"),
    [
        (1.0, None, "outside [0, 1)"),
        (-0.1, None, "outside [0, 1)"),
        (float("nan"), None, "outside [0, 1)"),
        (None, "5:4", "N must lie between 1 and M"),
        (None, "0:4", "N must lie between 1 and M"),
        (None, "two", "neither 'unstructured' nor N:M"),
        (0.75, "2:4", "contradicts"),
    ],
)
def test_bad_patterns_are_named(sparsity, pattern, said):
    with pytest.raises(PruneForgeError) as error:
        parse_pattern(sparsity, pattern, "row")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
