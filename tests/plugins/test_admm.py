"""ADMM against what its paper writes, and against SparseGPT."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama, tokens
from solved import layer_error, pruned_by

import pruneforge
from pruneforge import NM, PruneForgeError, Unstructured
from pruneforge.testing.samples import sample


def smallest(places, score, count):
    """The `count` places of the smallest scores; of equal ones, the first."""
    return set(sorted(places, key=lambda place: (score[place], place))[:count])


def removed(score, pattern, share):
    """What a support leaves out after a share of the way, as places (row, column)."""
    rows, columns = range(len(score)), range(len(score[0]))
    by_place = {(i, j): score[i][j] for i in rows for j in columns}
    if isinstance(pattern, Unstructured):
        groups = [[(i, j) for j in columns] for i in rows] if pattern.scope == "row" else [list(by_place)]
        return set().union(*(smallest(g, by_place, int(len(g) * share * pattern.sparsity + 1e-9)) for g in groups))
    blocks = [[(i, j + k) for k in range(pattern.m)] for i in rows for j in range(0, len(columns), pattern.m)]
    whole = set().union(*(smallest(block, by_place, pattern.m - pattern.n) for block in blocks))
    return smallest(whole, by_place, int(len(by_place) * share * pattern.sparsity + 1e-9))


def by_the_paper(weight, gram, pattern, iterations, ramp, cubic, damping):
    """ADMM as the formula stands, one entry at a time: A, Y = A B and B = P (Y + Z - U) for each row of W."""
    rows, columns = len(weight), len(gram)
    d = [gram[j][j] ** 0.5 + 1e-8 for j in range(columns)]
    a = [[gram[i][j] / (d[i] * d[j]) for j in range(columns)] for i in range(columns)]
    mean = sum(a[j][j] for j in range(columns)) / columns
    for j in range(columns):
        a[j][j] += damping * mean
    p = torch.linalg.inv(torch.tensor(a, dtype=torch.float64) + torch.eye(columns, dtype=torch.float64)).tolist()
    b = [[weight[i][j] * d[j] for j in range(columns)] for i in range(rows)]
    y = [[sum(a[j][k] * b[i][k] for k in range(columns)) for j in range(columns)] for i in range(rows)]
    u = [[0.0] * columns for _ in range(rows)]
    gone: set = set()
    for t in range(iterations):
        if t < ramp:
            share = 1 - (1 - (t + 1) / ramp) ** 3 if cubic else 1
            gone = removed([[abs(b[i][j] + u[i][j]) for j in range(columns)] for i in range(rows)], pattern, share)
        for i in range(rows):
            z = [0.0 if (i, j) in gone else b[i][j] + u[i][j] for j in range(columns)]
            u[i] = [u[i][j] + b[i][j] - z[j] for j in range(columns)]
            b[i] = [sum(p[j][k] * (y[i][k] + z[k] - u[i][k]) for k in range(columns)) for j in range(columns)]
    updated = [[0.0 if (i, j) in gone else (b[i][j] + u[i][j]) / d[j] for j in range(columns)] for i in range(rows)]
    mask = [[(i, j) not in gone for j in range(columns)] for i in range(rows)]
    return torch.tensor(mask), torch.tensor(updated, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["cubic", "constant"])
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.6, "layer"), Unstructured(0.6), NM(2, 4), NM(3, 8), NM(1, 4)], ids=repr
)
def test_admm_does_what_the_paper_writes(pattern, schedule):
    made = sample((5, 16), seed=3)
    inputs = made.inputs.clone()
    inputs[..., 6] = 0  # a dead input
    made = sample((5, 16), seed=3, inputs=inputs)
    flat = inputs.flatten(0, 1)
    gram = (flat.T @ flat / len(inputs)).tolist()
    for iterations, ramp, damping in ((20, 15, 0.1), (7, 3, 0.01)):
        found = pruned_by("admm", made, pattern, schedule=schedule, iterations=iterations, ramp=ramp, damping=damping)
        mask, weight = by_the_paper(made.weight.tolist(), gram, pattern, iterations, ramp, schedule == "cubic", damping)
        assert torch.equal(found.mask, mask)
        assert torch.allclose(found.weight, weight, rtol=1e-9, atol=1e-12)
        assert pattern.fits(found.mask)
        assert (found.weight[~found.mask] == 0).all()


def test_ties_are_pruned_in_the_order_of_their_index():
    equal = sample((4, 8), weight=torch.ones(4, 8), inputs=torch.eye(8).expand(6, 8, 8))
    found = pruned_by("admm", equal, Unstructured(0.5, "layer"), ramp=1)
    assert torch.equal(found.mask.flatten(), torch.arange(32) >= 16)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("schedule", ["cubic", "constant"])
def test_its_error_on_correlated_inputs_is_below_sparsegpts(pattern, schedule):
    for seed in range(8):
        for dtype in (torch.float64, torch.float32):
            made = sample((24, 48), dtype, seed)
            error = layer_error(made, pruned_by("admm", made, pattern, schedule=schedule))
            assert error < 0.8 * layer_error(made, pruned_by("sparsegpt", made, pattern)), (seed, dtype)


def test_more_iterations_come_close_to_the_best_weights_of_their_support():
    made, pattern = sample((6, 16), seed=1), Unstructured(0.5, "layer")
    found = pruned_by("admm", made, pattern, iterations=4000, damping=0)
    inputs, best = made.inputs.flatten(0, 1), torch.zeros(6, 16, dtype=torch.float64)
    for row, kept in enumerate(found.mask):
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], inputs @ made.weight[row]).solution
    assert torch.allclose(found.weight, best, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_model_keeps_its_zeros_and_every_layer_its_allocated_share(pattern):
    model = tiny_llama()
    more = {} if pattern else {"allocator": "owl"}
    found = pruneforge.prune(model, "admm", None if pattern else 0.6, pattern, tokens().split(3), **more)
    weights, parameters = 0, dict(model.named_parameters())
    for name, mask in found.masks.items():
        weights += int((~mask).sum())
        assert (parameters[f"{name}.weight"][~mask] == 0).all()
        assert parameters[f"{name}.weight"].isfinite().all()
    total = sum(mask.numel() for mask in found.masks.values())
    assert weights == int(total * (0.5 if pattern else 0.6))
    shares = {(~mask).double().mean().item() for mask in found.masks.values()}
    assert (len(shares) == 1) is (pattern is not None)


def test_options_are_checked():
    for option, said in (
        ({"schedule": "linear"}, "'cubic' or 'constant'"),
        ({"ramp": 0}, "ramp=0"),
        ({"damping": -1}, "damping=-1"),
    ):
        with pytest.raises(PruneForgeError, match=said):
            pruned_by("admm", sample(), Unstructured(0.5, "layer"), **option)
