"""D2Prune, in its form for Wanda, against what its authors accumulate."""

from __future__ import annotations

import itertools

import experts
import pytest
import reference
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import ColumnSquares, PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.testing import parametrize_with_checks
from pruneforge.testing.samples import sample
from pruneforge_d2prune.metric import InputNorms, OutputNorms


def score_of(made, **options):
    metric = loaded_plugins().registry.create("metric", "d2prune", options)
    return metric.score(made.layer(), made.statistics(metric.requires))


def by_the_authors(made, r1, r2, s):
    """The score with sums that run over samples, one entry at a time."""
    weight, inputs, outputs = made.weight.tolist(), made.inputs.tolist(), made.outputs.tolist()
    rows, columns = range(len(weight)), range(len(weight[0]))
    squares, y, z = [0.0] * len(columns), [0.0] * len(rows), [0.0] * len(columns)
    for n, (x, out) in enumerate(zip(inputs, outputs, strict=True), 1):
        norms = [sum(token[j] ** 2 for token in x) ** 0.5 for j in columns]
        squares = [squares[j] * (n - 1) / n + norms[j] ** 2 / n for j in columns]
        z = [z[j] * (n - 1) / n + norms[j] / s for j in columns]
        y = [y[i] * (n - 1) / n + sum(token[i] ** 2 for token in out) ** 0.5 / s for i in rows]

    def entry(i, j):
        w = abs(weight[i][j])
        return w**2 * squares[j] + r1 * y[i] * w * z[j] - r2 * w**2 * z[j] ** 2

    return torch.tensor([[entry(i, j) for j in columns] for i in rows], dtype=torch.float64)


def alike():
    """A layer of which every sample has the same tokens in another order, and so the same norms."""
    one = sample((6, 10), seed=4).inputs[0]
    orders = [torch.randperm(len(one), generator=torch.Generator().manual_seed(n)) for n in range(6)]
    return sample((6, 10), seed=4, inputs=torch.stack([one[order] for order in orders]))


@pytest.mark.parametrize(("r1", "r2", "s"), [(1.0, 0.0, 1500.0), (2.5, 0.7, 30.0), (0.0, 0.5, 4.0)])
def test_samples_of_equal_norms_give_the_authors_scores(r1, r2, s):
    made = alike()
    assert torch.allclose(score_of(made, r1=r1, r2=r2, divisor=s), by_the_authors(made, r1, r2, s), rtol=1e-9)


def test_its_norms_are_the_authors_mean_over_the_orders_of_samples():
    made = sample((2, 4), seed=4)
    made = sample((2, 4), seed=4, inputs=made.inputs * torch.arange(1, 7)[:, None, None])  # norms vary
    metric = loaded_plugins().registry.create("metric", "d2prune", {"divisor": 20})
    stats = made.statistics(metric.requires)
    for kind, values in zip(metric.requires[1:], (made.inputs, made.outputs), strict=True):
        norms, running = values.norm(dim=1), []
        for order in itertools.permutations(range(6)):
            total = torch.zeros_like(norms[0])
            for n, place in enumerate(order, 1):
                total = total * (n - 1) / n + norms[place] / 20
            running.append(total)
        assert torch.stack(running).std(0).min() > 0.01  # theirs depend on the order
        assert torch.allclose(metric._norms(stats[kind]), torch.stack(running).mean(0), rtol=1e-9)


def model_masks(made, data, **options):
    return pruneforge.prune(made, "d2prune", 0.5, None, data, options=options, propagate="dense").masks


def test_padded_samples_have_norms_of_their_own():
    lengths, valid = [24, 24, 24, 24, 17, 9], torch.ones(6, 24, dtype=torch.long)
    valid[4, 17:] = valid[5, 9:] = 0
    padded = [{"input_ids": tokens()[rows], "attention_mask": valid[rows]} for rows in (slice(0, 2), slice(2, 6))]
    alone = [row[None, :length] for row, length in zip(tokens(), lengths, strict=True)]
    options = {"r2": 3.0, "divisor": 10}
    expected = model_masks(tiny_llama(), alone, **options)
    assert all(torch.equal(mask, expected[name]) for name, mask in model_masks(tiny_llama(), padded, **options).items())
    model, kind = tiny_llama(), reference.LanguageModel
    whole = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in alone]
    for name, block in kind.blocks(model):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(kind, model, layers, whole)
        for layer, module in layers:
            weight, each = module.weight.detach().abs(), inputs[layer]
            z = sum(x.norm(dim=0) for x in each) * 7 / 12 / 10
            y = sum((x @ module.weight.T).detach().norm(dim=0) for x in each) * 7 / 12 / 10
            squares = torch.cat(each).square().sum(0) / 6
            score = weight**2 * squares + y[:, None] * weight * z - 3 * weight**2 * z**2
            assert torch.equal(expected[layer], reference.mask_by_sorting(score, 0.5, None, "row")), layer


def test_without_its_terms_it_prunes_as_wanda_does_and_needs_no_norms():
    metric = loaded_plugins().registry.create("metric", "d2prune", {"r1": 0})
    assert list(metric.requires) == [ColumnSquares]
    found = model_masks(tiny_llama(), tokens().split(3), r1=0)
    wanda = pruneforge.prune(tiny_llama(), "wanda", 0.5, None, tokens().split(3), propagate="dense").masks
    assert all(torch.equal(found[name], mask) for name, mask in wanda.items())


def test_experts_have_no_norms_of_samples():
    data = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))]
    said = r"statistic InputNorms is of one sample at a time, and layer '.*experts"
    with experts.registered(), pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(experts.tiny(), "d2prune", 0.5, None, data)


def test_a_divisor_of_zero_is_refused():
    with pytest.raises(PruneForgeError, match=r"option divisor=0\.0 of d2prune"):
        loaded_plugins().registry.create("metric", "d2prune", {"divisor": 0.0})


@parametrize_with_checks([InputNorms, OutputNorms])
def test_its_statistics_keep_their_promises(check):
    assert check.run() is None  # it raises otherwise
