"""Further methods against what their papers write: RIA, Wanda++, random, SparseSwaps."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import NM, Gram, Layer, LayerStatistics, Pruned, Unstructured
from pruneforge.plugins import loaded_plugins


def samples():
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens()]


@pytest.mark.parametrize(("scope", "pattern"), [("layer", None), ("row", None), (None, "2:4")])
def test_ria_selects_what_the_paper_writes(scope, pattern):
    model, kind = tiny_llama(), reference.LanguageModel
    options = {"scope": scope} if scope else {}
    found = pruneforge.prune(
        tiny_llama(), "ria", None if pattern else 0.5, pattern, tokens().split(3), options=options, propagate="dense"
    )
    for name, block in kind.blocks(model):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(kind, model, layers, samples())
        for layer, module in layers:
            weight = module.weight.detach().abs()
            norm = (torch.cat(inputs[layer]).square().sum(0) / len(tokens())).sqrt()
            scores = (weight / weight.sum(0) + weight / weight.sum(1, keepdim=True)) * norm**0.5
            expected = reference.mask_by_sorting(scores, 0.5, (2, 4) if pattern else None, scope or "row")
            assert torch.equal(found.masks[layer], expected), layer


def padded():
    """The same tokens in batches, of which two samples end early."""
    valid = torch.ones(6, 24, dtype=torch.long)
    valid[4, 17:] = valid[5, 9:] = 0
    return [{"input_ids": tokens()[rows], "attention_mask": valid[rows]} for rows in (slice(0, 2), slice(2, 6))]


def wandapp_masks(lengths, alpha, pattern):
    """The score of Wanda++ as the paper writes it: one sample at a time, cut where its padding begins."""
    model, kind, masks = tiny_llama(), reference.LanguageModel, {}
    cut = [{"input_ids": row[None, :length]} for row, length in zip(tokens(), lengths, strict=True)]
    whole = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in cut]
    for name, block in kind.blocks(model):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(kind, model, layers, whole)
        squares = {layer: torch.zeros_like(module.weight) for layer, module in layers}
        outputs = []
        handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))  # noqa: B023
        for sample in whole:
            kind.run(model, sample)
            gradients = torch.autograd.grad(outputs.pop().norm(), [module.weight for _, module in layers])
            for (layer, _), gradient in zip(layers, gradients, strict=True):
                squares[layer] += gradient**2
        handle.remove()
        for layer, module in layers:
            weight = module.weight.detach()
            norm = (torch.cat(inputs[layer]) ** 2).sum(0).sqrt() / len(whole) ** 0.5
            score = (alpha * (squares[layer] / len(whole)).sqrt() + norm) * weight.abs()
            masks[layer] = reference.mask_by_sorting(score, 0.5, pattern, "row")
        for layer, module in layers:  # the next block sees this one pruned
            module.weight.data.mul_(masks[layer])
    return masks


@pytest.mark.parametrize("data", [tokens().split(3), padded()], ids=["whole", "padded"])
@pytest.mark.parametrize(("alpha", "pattern"), [(100.0, None), (1.0, None), (1.0, "2:4")])
def test_wandapp_selects_what_the_paper_writes(data, alpha, pattern):
    lengths = [24] * 6 if isinstance(data, tuple) else [24, 24, 24, 24, 17, 9]
    sparsity, options = None if pattern else 0.5, {"alpha": alpha}
    found = pruneforge.prune(tiny_llama(), "wanda++", sparsity, pattern, data, options=options)
    expected = wandapp_masks(lengths, alpha, (2, 4) if pattern else None)
    assert found.masks.keys() == expected.keys()
    for layer, mask in expected.items():
        assert torch.equal(found.masks[layer], mask), layer
    without = pruneforge.prune(tiny_llama(), "wanda", sparsity, pattern, data).masks
    assert all(not torch.equal(without[layer], mask) for layer, mask in expected.items())  # gradients have a say


def test_random_masks_come_from_the_seed_and_differ_from_layer_to_layer():
    first, same, other = (pruneforge.prune(tiny_llama(), "random", 0.5, seed=seed).masks for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["model.layers.0.self_attn.q_proj"], first["model.layers.1.self_attn.q_proj"])
    shares = torch.stack([mask.double().mean(0) for name, mask in first.items() if name.endswith("q_proj")])
    assert (shares - 0.5).abs().max() < 0.3  # no column is preferred


def layer_and_statistics(rows=6, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(50, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)  # correlated
    gram = Gram((rows, columns), torch.float64, torch.device("cpu"))
    gram.update(inputs, 5)
    return Layer("layer", torch.nn.Parameter(weight)), LayerStatistics({Gram: gram}, {}), inputs


def row_errors(layer, mask, inputs):
    return (inputs @ (layer.weight * ~mask).T).square().sum(0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.25, "layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_sparseswaps_ends_where_no_swap_lowers_a_rows_error(pattern, seed):
    layer, stats, inputs = layer_and_statistics(seed=seed)
    start = pattern.select(torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)))  # far from the best
    refiner = loaded_plugins().registry.create("refiner", "sparseswaps")
    found = refiner.refine(layer, stats, Pruned(start), pattern).mask
    before, after = row_errors(layer, start, inputs), row_errors(layer, found, inputs)
    assert torch.equal(found.sum(1), start.sum(1))
    assert pattern.fits(found)
    assert (after <= before * (1 + 1e-12)).all()
    assert (after < before).any()
    for row, kept, pruned in itertools.product(range(6), range(8), range(8)):
        allowed = isinstance(pattern, Unstructured) or kept // pattern.m == pruned // pattern.m
        if allowed and found[row, kept] and not found[row, pruned]:
            swapped = found.clone()
            swapped[row, kept], swapped[row, pruned] = False, True
            assert row_errors(layer, swapped, inputs)[row] >= after[row] * (1 - 1e-5)


def test_sparseswaps_stops_after_its_steps_and_each_takes_the_best_swap():
    layer, stats, inputs = layer_and_statistics(rows=1, seed=3)
    start = Unstructured(0.5).select(-layer.weight.abs())  # the worst by magnitude
    refiner = loaded_plugins().registry.create("refiner", "sparseswaps", {"steps": 1})
    found = refiner.refine(layer, stats, Pruned(start), Unstructured(0.5)).mask
    swaps = []
    for kept, pruned in itertools.product(range(8), range(8)):
        if start[0, kept] and not start[0, pruned]:
            swapped = start.clone()
            swapped[0, kept], swapped[0, pruned] = False, True
            swaps.append((row_errors(layer, swapped, inputs).item(), swapped))
    assert torch.equal(found, min(swaps, key=lambda swap: swap[0])[1])


def greedy(layer, start, inputs, group):
    """Of each row, take the best of all swaps until none lowers the error, each compared by its error itself."""
    found, gram = start.clone(), inputs.T @ inputs
    for weight, keep in zip(layer.weight, found, strict=True):
        while True:
            error = (weight * ~keep) @ gram @ (weight * ~keep)
            best, swap = error * (1 - 1e-9), None
            for p, u in itertools.product((~keep).nonzero()[:, 0].tolist(), keep.nonzero()[:, 0].tolist()):
                if p // group == u // group:
                    removed = weight * ~keep
                    removed[p], removed[u] = 0, weight[u]
                    if removed @ gram @ removed < best:
                        best, swap = removed @ gram @ removed, (p, u)
            if swap is None:
                break
            keep[swap[0]], keep[swap[1]] = True, False
    return found


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.6, "layer"), NM(2, 4), NM(5, 8)], ids=str)
def test_sparseswaps_in_rounds_is_as_good_as_the_best_swap_each_time(pattern):
    layer, stats, inputs = layer_and_statistics(4, 40, seed=1)
    start = pattern.select(layer.weight.abs())
    refiner = loaded_plugins().registry.create("refiner", "sparseswaps", {"candidates": 6})
    found = refiner.refine(layer, stats, Pruned(start), pattern).mask
    before, after = row_errors(layer, start, inputs), row_errors(layer, found, inputs)
    plain = row_errors(layer, greedy(layer, start, inputs, getattr(pattern, "m", 40)), inputs)
    assert (after <= before).all()
    assert before.sum() - after.sum() > 0.9 * (before.sum() - plain.sum())


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.7), NM(2, 4), NM(4, 4), NM(2, 8), Unstructured(0.9, "layer")], ids=str
)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_sparseswaps_never_raises_an_error_and_never_swaps_more_than_its_steps(pattern, steps):
    layer, stats, inputs = layer_and_statistics(24, 160)
    start = pattern.select(layer.weight.abs())
    refiner = loaded_plugins().registry.create("refiner", "sparseswaps", {"steps": steps})
    narrow = Layer("layer", torch.nn.Parameter(layer.weight.float()))
    gram = Gram((24, 160), torch.float32, torch.device("cpu"))
    gram.update(inputs.float(), 5)
    for one, sums in ((layer, stats), (narrow, LayerStatistics({Gram: gram}, {}))):
        found = refiner.refine(one, sums, Pruned(start), pattern).mask
        before, after = row_errors(layer, start, inputs), row_errors(layer, found, inputs)
        assert (after <= before).all()
        assert (after < before).any() == (pattern.sparsity > 0)
        assert torch.equal(found.sum(1), start.sum(1))
        assert pattern.fits(found)
        assert (found & ~start).sum(1).max() <= steps


def test_weights_that_a_metric_updated_stay_with_their_mask():
    plain = pruneforge.prune(tiny_llama(), "sparsegpt", 0.5, None, tokens().split(3))
    refined = pruneforge.prune(tiny_llama(), "sparsegpt", 0.5, None, tokens().split(3), refine="sparseswaps")
    assert all(torch.equal(refined.masks[name], mask) for name, mask in plain.masks.items())
    assert any("its mask was not refined" in warning for warning in refined.report["warnings"])


def test_refined_masks_lower_the_loss_of_a_trained_model(checkpoint):
    data = {"calibration": "python-docs", "samples": 16, "seqlen": 128}
    losses = [
        pruneforge.evaluate(pruned, "perplexity", data="python-docs", window=128, limit=20)["loss"]
        for pruned in (
            pruneforge.prune(checkpoint, "wanda", 0.6, **data),
            pruneforge.prune(checkpoint, "wanda", 0.6, refine="sparseswaps", **data),
        )
    ]
    assert losses[1] < losses[0] - 0.05
