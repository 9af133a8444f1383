"""Pruner-Zero against what its paper and code write."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import GradientSquares
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.samples import sample


def score_of(made):
    metric = loaded_plugins().registry.create("metric", "pruner-zero")
    return metric.score(made.layer(), made.statistics([GradientSquares]))


def by_the_paper(weight, gradients, factor):
    """W^2 times the min-max-normalised norm of scaled gradients, one entry at a time."""
    rows, columns = range(len(weight)), range(len(weight[0]))
    norm = [[sum((factor * g[i][j]) ** 2 for g in gradients) ** 0.5 for j in columns] for i in rows]
    low, high = min(map(min, norm)), max(map(max, norm))
    scores = [[weight[i][j] ** 2 * (norm[i][j] - low) / (high - low) for j in columns] for i in rows]
    return torch.tensor(scores, dtype=torch.float64)


def test_the_score_is_the_paper_s_and_the_scaling_of_gradients_cancels():
    made = sample((6, 10), seed=2)
    found = score_of(made)
    for factor in (1, 100):
        assert torch.allclose(found, by_the_paper(made.weight.tolist(), made.gradients.tolist(), factor), rtol=1e-9)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_masks_of_a_model_are_what_the_authors_select(pattern):
    model, data = tiny_llama(), [{"input_ids": row[None]} for row in tokens()]
    whole = [{**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in data]
    gradients = reference.sample_gradients(reference.LanguageModel, model, whole)
    found = pruneforge.prune(tiny_llama(), "pruner-zero", None if pattern else 0.5, pattern, tokens().split(3))
    for name, block in reference.LanguageModel.blocks(model):
        for layer, module in reference.linears(name, block):
            norm = torch.stack([100 * gradient for gradient in gradients[layer]]).square().sum(0).sqrt()
            score = module.weight.detach() ** 2 * (norm - norm.min()) / (norm.max() - norm.min())
            expected = reference.mask_by_sorting(score, 0.5, (2, 4) if pattern else None, "row")
            assert torch.equal(found.masks[layer], expected), layer


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_gradients_leave_the_squared_weights(value):
    made = sample((6, 10), gradients=torch.full((6, 6, 10), value))
    assert torch.equal(score_of(made), made.weight.square())
