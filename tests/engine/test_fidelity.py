"""The engine's masks are those of the slow reference."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from conftest import tiny_llama, tokens

import pruneforge

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]
PATTERNS = [None, (2, 4)]


def padded_samples() -> list[dict]:
    """Six sequences of unequal length, right-padded."""
    ids = tokens()
    mask = torch.ones_like(ids)
    for row, length in enumerate([24, 17, 24, 9, 20, 24]):
        mask[row, length:] = 0
    return [{"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, mask, strict=True)]


def batched(samples: list[dict], size: int) -> list[dict]:
    return [
        {key: torch.cat([s[key] for s in samples[i : i + size]]) for key in samples[0]}
        for i in range(0, len(samples), size)
    ]


def pattern_text(pattern) -> str | None:
    return f"{pattern[0]}:{pattern[1]}" if pattern else None


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("metric", METRICS)
def test_masks_and_weights_equal_the_reference_in_float64(metric, pattern, propagate):
    model = tiny_llama()
    samples = padded_samples()
    expected_model, expected = reference.prune(model, metric, samples, pattern=pattern, propagate=propagate)
    result = pruneforge.prune(
        model,
        metric,
        0.5,
        pattern_text(pattern),
        batched(samples, 4),
        propagate=propagate,
    )
    assert list(result.masks) == list(expected)
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name
    for (name, ours), theirs in zip(result.model.named_parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("metric", METRICS)
def test_masks_agree_in_float32_to_one_in_a_thousand(metric, pattern):
    model = tiny_llama(torch.float32)
    samples = padded_samples()
    expected_model, expected = reference.prune(copy.deepcopy(model).double(), metric, samples, pattern=pattern)
    result = pruneforge.prune(model, metric, 0.5, pattern_text(pattern), batched(samples, 4))
    agree = sum((result.masks[name] == expected[name]).sum().item() for name in expected)
    assert agree / sum(mask.numel() for mask in expected.values()) >= 0.999
    ids = tokens(1, 480, seed=5)[0]
    ours, theirs = reference.perplexity(result.model, ids, 48), reference.perplexity(expected_model, ids, 48)
    assert ours == pytest.approx(theirs, rel=0.005)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("metric", METRICS)
def test_other_sparsities_equal_the_reference(metric, sparsity):
    model = tiny_llama()
    samples = padded_samples()
    _, expected = reference.prune(model, metric, samples, sparsity=sparsity)
    result = pruneforge.prune(model, metric, sparsity, None, batched(samples, 2))
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name


@pytest.mark.parametrize("pattern", [(4, 8), (1, 4), (3, 4), (8, 16)])
def test_other_patterns_equal_the_reference_where_weights_are_updated(pattern):
    model = tiny_llama()
    samples = padded_samples()
    sparsity = 1 - pattern[0] / pattern[1]
    _, expected = reference.prune(model, "sparsegpt", samples, sparsity=sparsity, pattern=pattern)
    result = pruneforge.prune(model, "sparsegpt", None, pattern_text(pattern), batched(samples, 2))
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_of_one_sample_are_plain_autograds(norm):
    model = tiny_llama()
    samples = padded_samples()
    for alpha in (0.01, 1e5):
        _, expected = reference.prune(model, "gblm", samples, norm=norm, alpha=alpha)
        options = {"norm": norm, "alpha": alpha}
        result = pruneforge.prune(copy.deepcopy(model), "gblm", 0.5, None, batched(samples, 3), options=options)
        for name in expected:
            assert torch.equal(result.masks[name], expected[name]), name


@pytest.mark.parametrize("metric", METRICS)
def test_real_model_and_text_agree_with_the_reference(metric, shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared_data / "tinystories.txt").read_text()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    calibration = ids[: 8 * 128].view(8, 128)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones(1, 128)} for row in calibration]
    dense = AutoModelForCausalLM.from_pretrained(folder)
    for pattern in PATTERNS:
        expected_model, expected = reference.prune(copy.deepcopy(dense).double(), metric, samples, pattern=pattern)
        result = pruneforge.prune(copy.deepcopy(dense), metric, 0.5, pattern_text(pattern), calibration.split(4))
        agree = sum((result.masks[name] == expected[name]).sum().item() for name in expected)
        assert agree / sum(mask.numel() for mask in expected.values()) >= 0.999
        held_out = ids[-8 * 512 :]
        ours = reference.perplexity(result.model, held_out, 512)
        assert ours == pytest.approx(reference.perplexity(expected_model, held_out, 512), rel=0.005)
