"""ALPS against what its paper and its authors' schedule say, and against other solvers."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from solved import layer_error, pruned_by

from pruneforge import NM, Gram, LayerStatistics, Pruned, Unstructured
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.samples import sample

PATTERNS = [Unstructured(0.6, "layer"), Unstructured(0.5), NM(2, 4), NM(1, 4)]


def top(score, pattern):
    groups = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
    return reference.mask_by_sorting(score, pattern.sparsity, groups, getattr(pattern, "scope", "row"))


def by_the_paper(weight, gram, pattern, rho, damping, iterations, cg_steps):
    """ALPS in the paper's letters and orientation, B [in, out], with a plain inverse for each step."""
    columns = len(gram)
    gram = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    d = gram.diagonal().sqrt() + 1e-8
    a = gram / torch.outer(d, d)
    start = d[:, None] * weight.T
    y = a @ start
    kept = top(start.T.abs(), pattern).sum().item()
    last = top(start.T.abs(), pattern).T
    v, sparse, grown, path = torch.zeros_like(start), start * last, False, []
    for step in range(1, iterations + 1):
        b = torch.linalg.inv(a + rho * torch.eye(columns, dtype=gram.dtype)) @ (y - v + rho * sparse)
        sparse = (b + v / rho) * top((b + v / rho).T.abs(), pattern).T
        v = v + rho * (b - sparse)
        if step % 3 == 0:
            support = sparse != 0
            c, last = (support != last).sum().item(), support
            path.append((rho, c))
            if step >= 30 and c < 0.0003 * kept:
                break
            if c > 0.1 * kept:
                rho, grown = 1.3 * rho, True
            elif c > 0.005 * kept:
                rho, grown = 1.2 * rho, True
            elif c > 0.5 and grown:
                rho = 1.1 * rho
            elif c > 0.5:
                rho, v = rho / 5, torch.zeros_like(start)
                last = top(start.T.abs(), pattern).T
                sparse = start * last
            elif grown:
                break
            else:
                rho = rho / 5
    mask, found = top(b.T.abs(), pattern), torch.zeros_like(weight)
    for row, keep in enumerate(mask):  # conjugate gradients on the kept weights of each row
        x, part = b.T[row, keep], a[keep][:, keep]
        r = y[keep, row] - part @ x
        p = r
        for _ in range(cg_steps):
            if r.norm() < 1e-12:
                break
            alpha = (r @ r) / (p @ part @ p)
            x, after = x + alpha * p, r - alpha * (part @ p)
            p, r = after + (after @ after) / (r @ r) * p, after
        found[row, keep] = x
    return mask, found / d, path


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("rho", [0.1, 0.001, 3.0, 1000.0])
def test_alps_does_what_the_paper_writes(pattern, rho):
    paths = []
    for seed in range(3):
        inputs = sample((8, 16), seed=seed).inputs
        inputs[..., 6] = 0  # a dead input
        made = sample((8, 16), seed=seed, inputs=inputs)
        flat = inputs.flatten(0, 1)
        # The steps that remain would bring residuals below the relative 1e-4 at which conjugate gradients stop.
        options = {"rho": rho, "damping": 0.02, "iterations": 60, "cg_steps": 2}
        found = pruned_by("alps", made, pattern, **options)
        mask, weight, path = by_the_paper(made.weight, flat.T @ flat / len(inputs), pattern, **options)
        assert torch.equal(found.mask, mask)
        torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-8)
        assert pattern.fits(found.mask)
        assert (found.weight[~found.mask] == 0).all()
        paths.append(path)
    after_three_steps = [path[1][0] for path in paths]
    if rho == 1000:  # too large to change anything
        assert after_three_steps == [200] * 3
    elif rho < 1:
        assert min(after_three_steps) > rho


@pytest.mark.parametrize("sparsity", [0.6, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_error_on_correlated_inputs_is_below_sparsegpts_and_admms(sparsity, dtype):
    pattern = Unstructured(sparsity, "layer")
    for seed in range(8):
        made = sample((24, 48), dtype, seed)
        error = layer_error(made, pruned_by("alps", made, pattern))
        assert error < 0.75 * layer_error(made, pruned_by("sparsegpt", made, pattern)), seed
        assert error < layer_error(made, pruned_by("admm", made, pattern)), seed


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_keep_the_support_and_lower_the_error_to_its_least(pattern, dtype):
    for seed in range(5):
        made = sample((12, 32), dtype, seed)
        found = [pruned_by("alps", made, pattern, cg_steps=steps, damping=1e-6) for steps in (0, 1, 10, 200)]
        errors = [layer_error(made, each) for each in found]
        assert all(torch.equal(each.mask, found[0].mask) for each in found)
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors)), seed
        inputs, best = made.inputs.double().flatten(0, 1), torch.zeros(12, 32, dtype=torch.float64)
        for row, kept in enumerate(found[0].mask):
            target = inputs @ made.weight[row].double()
            best[row, kept] = torch.linalg.lstsq(inputs[:, kept], target).solution
        assert errors[-1] < 1.001 * layer_error(made, Pruned(found[0].mask, best))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_and_inputs_without_information_give_finite_weights(pattern, dtype):
    plain = sample((6, 16), dtype)
    low = plain.inputs[..., :3] @ torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    none = torch.zeros_like(plain.inputs)
    dead = torch.cat([plain.inputs[..., :10], none[..., 10:]], -1)
    cases = [{"inputs": low}, {"inputs": none}, {"inputs": dead}, {"weight": torch.zeros(6, 16)}]
    for case in cases:
        for damping in (0.01, 0.0):
            made = sample((6, 16), dtype, **case)
            found = pruned_by("alps", made, pattern, damping=damping)
            assert found.weight.isfinite().all()
            assert found.weight.dtype == dtype
            assert pattern.fits(found.mask)
            assert layer_error(made, found) <= (made.outputs.double().square().sum() * (1 + 1e-6)).item()


def test_layers_of_one_input_share_the_decomposition(monkeypatch):
    calls, real = [], torch.linalg.eigh

    def counted(matrix):
        calls.append(matrix.dtype)
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    made, shared = sample(dtype=torch.float32), {}
    metric = loaded_plugins().registry.create("metric", "alps")
    for pattern in (Unstructured(0.5, "layer"), Unstructured(0.7, "layer"), NM(2, 4)):
        stats = LayerStatistics({Gram: made.statistics((Gram,))[Gram]}, shared)
        assert pattern.fits(metric.prune_layer(made.layer(), stats, pattern).mask)
    assert calls == [torch.float64]
