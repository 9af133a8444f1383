"""Allocators against what their papers write, in loops and float64, and their shares against the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruneforge import Block, create, proportional, spread
from pruneforge.testing.samples import sample

SHAPES = (((8, 12), (12, 8)), ((6, 8), (40, 10)), ((9, 16), (4, 30)))


def made():
    """Three blocks of two layers, their samples and their sizes."""
    samples, blocks = {}, []
    for index, shapes in enumerate(SHAPES):
        layers = []
        for number, shape in enumerate(shapes):
            name = f"{index}.{number}"
            samples[name] = sample(shape, seed=10 * index + number)
            layers.append(replace(samples[name].layer(), name=name))
        blocks.append(Block(str(index), nn.Identity(), tuple(layers)))
    return blocks, samples, {block.name: {layer.name: layer.size for layer in block.layers} for block in blocks}


def allocated(name, sparsity, **options):
    """What an allocator measures of each layer or block, and the sparsity of each layer."""
    allocator = create("allocator", name, **options)
    blocks, samples, sizes = made()
    measures = {}
    for block in blocks:
        stats = {layer.name: samples[layer.name].statistics(allocator.requires) for layer in block.layers}
        measures[block.name] = allocator.measure(block, stats, None)
    return measures, allocator.allocate(measures, sizes, sparsity)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def from_blocks(values, sparsity, width):
    """The sparsity of each block: `width` around the run's, at first, then shifted so that the mean is the run's."""
    low, high = min(values.values()), max(values.values())
    mapped = {name: sparsity - width + 2 * width * (each - low) / (high - low) for name, each in values.items()}
    return {name: each - mean(mapped.values()) + sparsity for name, each in mapped.items()}


@given(
    layers=st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 500)), min_size=1, max_size=8),
    share=st.floats(0, 1),
)
def test_proportional_shares_have_their_mean_and_are_cut_only_at_one(layers, share):
    weights = {str(n): weight for n, (weight, _) in enumerate(layers)}
    sizes = {str(n): size for n, (_, size) in enumerate(layers)}
    found = proportional(weights, sizes, share)
    assert list(found) == list(weights)
    assert all(0 <= each <= 1 for each in found.values())
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(share * sum(sizes.values()))
    factors = {n: found[n] / weights[n] for n in weights if found[n] < 1}
    for n in weights:
        for factor in factors.values():
            assert factors.get(n, factor) == pytest.approx(factor)
            assert found[n] < 1 or factor * weights[n] >= 1 - 1e-9


def test_proportional_shares_of_nothing():
    assert proportional({"a": 0.0, "b": 0.0}, {"a": 3, "b": 4}, 0.5) == {"a": 0.0, "b": 0.0}
    assert proportional({"a": 1.0, "b": 0.0}, {"a": 3, "b": 4}, 0.9) == {"a": 1.0, "b": 0.0}
    assert proportional({}, {}, 0.5) == spread({}, 0.5, 0.1) == {}


def test_spread_shares_rise_linearly_around_their_mean():
    assert spread({"a": 3.0, "b": 5.0, "c": 13.0}, 0.5, 0.1) == pytest.approx({"a": 0.42, "b": 0.46, "c": 0.62})
    assert spread({"a": 2.0, "b": 2.0}, 0.3, 0.1) == {"a": 0.3, "b": 0.3}
    assert spread({"a": 0.0, "b": 1.0}, 0.95, 0.2) == pytest.approx({"a": 0.75, "b": 1.0})


@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_erk_has_the_one_epsilon_that_keeps_enough(sparsity):
    shapes = {f"{i}.{k}": shape for i, pair in enumerate(SHAPES) for k, shape in enumerate(pair)}
    low, high = 0.0, 1000.0
    for _ in range(200):  # by halving, which the product does not do
        epsilon = (low + high) / 2
        kept = sum(min(a * b, epsilon * (a + b)) for a, b in shapes.values())
        low, high = (
            (low, epsilon) if kept > (1 - sparsity) * sum(a * b for a, b in shapes.values()) else (epsilon, high)
        )
    expected = {name: 1 - min(1, epsilon * (a + b) / (a * b)) for name, (a, b) in shapes.items()}
    assert allocated("erk", sparsity)[1] == pytest.approx(expected, abs=1e-9)
    assert any(each == 0 for each in expected.values()) == (sparsity < 0.5)


def exponent(weight, fit, lower):
    """AlphaPruning's exponent of a weight, one start and one value at a time."""
    small = weight.T @ weight if weight.shape[1] <= weight.shape[0] else weight @ weight.T
    e = sorted(torch.linalg.eigvalsh(small).tolist())
    if fit == "mid":
        starts = [len(e) // 2]
    else:
        first, last = math.log10(e[0]), math.log10(e[-1])
        counts = [0] * 100
        for value in e:
            counts[min(int((math.log10(value) - first) / (last - first) * 100), 99)] += 1
        q = 10 ** (first + (last - first) * counts.index(max(counts)) / 100)
        least = 0.95 * q if lower == "paper" else math.log10(0.95 * q)
        starts = [i for i in range(len(e) - 1) if least <= e[i] <= 1.5 * q]
    found = []
    for i in starts:
        n = len(e) - i
        a = 1 + n / (sum(math.log(value) for value in e[i:]) - n * math.log(e[i]))
        distance = max(abs(1 - (e[i + t] / e[i]) ** (1 - a) - t / n) for t in range(n))
        found.append((distance, a))
    return min(found)[1]


@pytest.mark.parametrize("per", ["block", "layer"])
@pytest.mark.parametrize(("fit", "lower"), [("search", "paper"), ("search", "code"), ("mid", "paper")])
def test_alphapruning_is_what_the_paper_writes(fit, lower, per):
    measures, found = allocated("alphapruning", 0.6, fit=fit, lower=lower, per=per, eps=0.3)
    _, samples, sizes = made()
    alphas = {name: exponent(each.weight.double(), fit, lower) for name, each in samples.items()}
    for block, layers in sizes.items():
        assert measures[block] == pytest.approx({name: alphas[name] for name in layers})
        if per == "block":
            alphas |= dict.fromkeys(layers, mean(alphas[name] for name in layers))
    low, high = min(alphas.values()), max(alphas.values())
    ratios = {name: (alpha - low) / (high - low) * 2 * 0.3 + 1 - 0.3 for name, alpha in alphas.items()}
    size = {name: each for layers in sizes.values() for name, each in layers.items()}
    factor = 0.6 * sum(size.values()) / sum(size[name] * ratio for name, ratio in ratios.items())
    assert found == pytest.approx({name: factor * ratio for name, ratio in ratios.items()})


def test_the_two_lower_bounds_and_the_middle_differ_on_a_large_weight():
    weight = sample((40, 60), seed=3).weight * torch.linspace(0.3, 3, 60, dtype=torch.float64)
    block = Block("0", nn.Identity(), (sample((40, 60), weight=weight).layer(),))
    found = []
    for fit, lower in (("search", "paper"), ("search", "code"), ("mid", "paper")):
        (alpha,) = create("allocator", "alphapruning", fit=fit, lower=lower).measure(block, {}, None).values()
        assert alpha == pytest.approx(exponent(weight, fit, lower))
        found.append(alpha)
    assert len(set(found)) == 3


def test_alphapruning_has_no_alpha_of_equal_singular_values_and_leaves_out_zeros():
    allocator = create("allocator", "alphapruning")
    plain = torch.linspace(1, 9, 9, dtype=torch.float64).diag()
    weights = {"equal": torch.eye(9).double(), "zero": torch.zeros(9, 9).double(), "plain": plain}
    weights["low rank"] = torch.nn.functional.pad(plain, (0, 5, 0, 5))
    found, sizes = {}, {}
    for name, weight in weights.items():
        layer = replace(sample(tuple(weight.shape), weight=weight).layer(), name=name)
        found[name] = allocator.measure(Block(name, nn.Identity(), (layer,)), {}, None)
        sizes[name] = {name: weight.numel()}
    assert found["equal"] == found["zero"] == {}
    assert found["low rank"]["low rank"] == pytest.approx(found["plain"]["plain"])
    assert set(allocator.allocate(found, sizes, 0.5).values()) == {0.5}


def greedy_error(weight, inputs) -> float:
    """The error after half of each row went, each time the weight whose loss leaves the least error of all."""
    total = 0.0
    for row in weight:
        left = row.clone()
        for _ in range(len(row) // 2):
            errors = {}
            for i in left.nonzero()[:, 0].tolist():
                tried = left.clone()
                tried[i] = 0
                errors[i] = float((inputs @ (row - tried)).square().sum())
            left[min(errors, key=errors.get)] = 0
        total += float((inputs @ (row - left)).square().sum())
    return total


@pytest.mark.parametrize("per", ["block", "layer"])
def test_lsa_follows_the_error_that_greedy_removal_leaves(per):
    measures, found = allocated("lsa", 0.6, per=per, b=0.05)
    _, samples, sizes = made()
    errors = {name: greedy_error(each.weight, each.inputs.flatten(0, 1)) for name, each in samples.items()}
    for block, layers in sizes.items():
        assert measures[block] == pytest.approx({name: errors[name] for name in layers})
    if per == "block":
        errors = {block: sum(errors[name] for name in layers) for block, layers in sizes.items()}
    importance = {name: 1 - error / sum(errors.values()) for name, error in errors.items()}
    expected = from_blocks({name: -each for name, each in importance.items()}, 0.6, 0.05)
    for block, layers in sizes.items():
        for name in layers:
            assert found[name] == pytest.approx(expected[block if per == "block" else name])
    opposite = allocated("lsa", 0.6, per=per, b=0.05, redundant="low")[1]
    assert {name: 1.2 - each for name, each in opposite.items()} == pytest.approx(found)


def test_dlp_follows_the_median_score_of_each_block():
    _, found = allocated("dlp", 0.6, lam=0.07)
    _, samples, sizes = made()
    medians = {}
    for block, layers in sizes.items():
        scores = []
        for name in layers:
            weight, inputs = samples[name].weight, samples[name].inputs
            for j in range(weight.shape[1]):
                norm = math.sqrt(float(inputs[..., j].square().sum()) / len(inputs))
                scores += [abs(float(weight[i, j])) * norm for i in range(len(weight))]
        medians[block] = sorted(scores)[(len(scores) - 1) // 2]
    importance = {block: 1 - median / sum(medians.values()) for block, median in medians.items()}
    expected = from_blocks({block: -each for block, each in importance.items()}, 0.6, 0.07)
    for block, layers in sizes.items():
        assert {name: found[name] for name in layers} == pytest.approx(dict.fromkeys(layers, expected[block]))


@pytest.mark.parametrize("name", ["lsa", "dlp"])
def test_what_was_not_measured_has_the_sparsity_of_the_run(name):
    allocator = create("allocator", name)
    measures, _ = allocated(name, 0.6)
    sizes = made()[2] | {"experts": {"experts.0": 12}}
    assert allocator.allocate(measures | {"experts": {}}, sizes, 0.6)["experts.0"] == 0.6
    assert allocator.allocate({"experts": {}}, {"experts": {"experts.0": 12}}, 0.6) == {"experts.0": 0.6}
