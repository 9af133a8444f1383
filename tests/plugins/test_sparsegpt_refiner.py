"""SparseGPT's updates of the weights under masks of other methods."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import NM, Gram, LayerStatistics, Pruned, Unstructured
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.samples import sample

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4), NM(3, 8)]


def made_by(kind, name, **options):
    return loaded_plugins().registry.create(kind, name, options)


def layer_error(made, weight) -> float:
    return (made.inputs.double().flatten(0, 1) @ (made.weight - weight).double().T).square().sum().item()


def by_the_paper(weight, gram, mask, damping):
    """One row after the other: remove each pruned weight, and let those to its right make up for it."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    updated = weight.clone()
    for row, keep in zip(updated, mask, strict=True):
        for j in range(len(row)):
            if not keep[j]:
                inverse = torch.linalg.inv(hessian[j:, j:])  # of the columns that are left
                row[j:] -= row[j] / inverse[0, 0] * inverse[0]
                row[j] = 0
    return updated


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("block_size", [8, 128])
def test_weights_are_those_of_the_paper_under_the_mask(pattern, block_size):
    made = sample((6, 16), seed=2)
    stats, start = made.statistics((Gram,)), Pruned(pattern.select(made.weight.abs()))
    refiner = made_by("refiner", "sparsegpt", block_size=block_size, damping=0.05)
    found = refiner.refine(made.layer(), stats, start, pattern)
    assert torch.equal(found.mask, start.mask)
    expected = by_the_paper(made.weight, stats[Gram].total, start.mask, 0.05)
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_never_above_that_of_the_mask_and_mostly_below(pattern, dtype):
    shares = []
    for seed in range(9):
        made = sample((24, 32), dtype, seed)
        start = Pruned(pattern.select(made.weight.abs() * made.inputs.flatten(0, 1).norm(dim=0)))
        found = made_by("refiner", "sparsegpt").refine(made.layer(), made.statistics((Gram,)), start, pattern)
        plain = made.weight * start.mask
        weight = plain if found.weight is None else found.weight
        assert (found.weight is None) is bool(found.notes)
        assert (weight[~found.mask] == 0).all()
        shares.append(layer_error(made, weight) / layer_error(made, plain))
    assert max(shares) <= 1
    assert sorted(shares)[4] < 0.95


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_weights_that_were_updated_before_are_no_start_and_stay_if_they_are_better(pattern):
    made = sample((12, 32), seed=1)
    inputs, best = made.inputs.flatten(0, 1), torch.zeros_like(made.weight)
    mask = pattern.select(made.weight.abs())
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], inputs @ made.weight[row]).solution
    refined = [
        made_by("refiner", "sparsegpt").refine(made.layer(), made.statistics((Gram,)), Pruned(mask, weight), pattern)
        for weight in (best, 1e3 * best, -1e3 * best)
    ]
    assert torch.equal(refined[0].weight, best)
    assert refined[0].notes == ("updated weights had a higher error: left as given",)
    assert torch.equal(refined[1].weight, refined[2].weight)
    assert not refined[1].notes


def test_a_layer_that_would_lose_by_it_keeps_its_weights():
    generator = torch.Generator().manual_seed(0)
    # The first input is the sum of the other two, large and nearly opposite: both would have to take its weight.
    second = 10 * torch.randn(6, 16, generator=generator, dtype=torch.float64)
    third = 0.1 * torch.randn(6, 16, generator=generator, dtype=torch.float64) - second
    inputs = torch.stack([second + third, second, third], -1)
    made = sample((1, 3), weight=torch.ones(1, 3), inputs=inputs)
    start = Pruned(torch.tensor([[False, True, False]]))
    refiner = made_by("refiner", "sparsegpt", damping=1e-9)
    found = refiner.refine(made.layer(), made.statistics((Gram,)), start, Unstructured(0.67))
    assert torch.equal(found.mask, start.mask)
    assert found.weight is None
    assert found.permutation is None
    assert found.notes == ("updated weights had a higher error: left as given",)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_under_the_metrics_own_mask_weights_and_factor_are_the_metrics(pattern, monkeypatch):
    calls, real = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(1) or real(matrix))
    inputs = sample((12, 32)).inputs
    inputs[..., 5] = 0
    made = sample((12, 32), inputs=inputs)
    stats = LayerStatistics({Gram: made.statistics((Gram,))[Gram]}, {})
    metric, refiner = made_by("metric", "sparsegpt"), made_by("refiner", "sparsegpt")
    pruned = metric.prune_layer(made.layer(), stats.owned_by(metric), pattern)
    found = refiner.refine(made.layer(), stats.owned_by(refiner), Pruned(pruned.mask), pattern)
    torch.testing.assert_close(found.weight, pruned.weight, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


def test_a_model_keeps_the_masks_of_another_metric():
    plain = pruneforge.prune(tiny_llama(), "wanda", 0.5, None, tokens().split(3), propagate="dense")
    model, before = tiny_llama(), dict(tiny_llama().named_parameters())
    found = pruneforge.prune(model, "wanda", 0.5, None, tokens().split(3), propagate="dense", refine="sparsegpt")
    for name, mask in plain.masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(found.masks[name], mask)
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight, before[f"{name}.weight"] * mask)
