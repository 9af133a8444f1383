"""What uses a weight, and how it lies in its parameter: products, transposed weights, slices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pruneforge import Layer, PointwiseConvLayer, SlicedLayer, TransposedLayer, find_layers
from pruneforge.engine.recorder import WeightUses


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "multiply"),
    [
        (Layer("a", parameter(6, 4)), lambda x, w: F.linear(x, w)),
        (Layer("a", parameter(6, 4)), lambda x, w: F.linear(input=x, weight=w)),
        (Layer("a", parameter(6, 4)), lambda x, w: x @ w.T),
        (Layer("a", parameter(6, 4)), lambda x, w: torch.matmul(x, w.mT)),
        (Layer("a", parameter(6, 4)), lambda x, w: torch.mm(x, w.t())),
        (Layer("a", parameter(6, 4)), lambda x, w: torch.addmm(x.new_zeros(6), x, w.t())),
        (TransposedLayer("a", parameter(4, 6)), lambda x, w: torch.addmm(x.new_zeros(6), x, w)),
        (TransposedLayer("a", parameter(4, 6)), lambda x, w: torch.addmm(x.new_zeros(6), mat1=x, mat2=w)),
        (TransposedLayer("a", parameter(4, 6)), lambda x, w: x @ w),
        (TransposedLayer("a", parameter(4, 6)), lambda x, w: F.linear(x, w.T)),
        (SlicedLayer("a", parameter(3, 6, 4), 1), lambda x, w: F.linear(x, w[1])),
        (SlicedLayer("a", parameter(3, 6, 4), 1), lambda x, w: F.linear(x, w.unbind()[1])),
        (SlicedLayer("a", parameter(3, 6, 4), 1), lambda x, w: x @ w[1].T),
    ],
)
def test_a_weight_is_found_in_its_products(layer, multiply):
    x, seen = torch.randn(5, 4, dtype=torch.float64), []
    with WeightUses([layer], after=lambda la, given, result: seen.append((la, given, result))):
        y = multiply(x, layer.parameter)
    assert [(found.name, given is x, result is y) for found, given, result in seen] == [("a", True, True)]
    torch.testing.assert_close(y, x @ layer.weight.T)


@pytest.mark.parametrize(
    ("layer", "multiply"),
    [
        (SlicedLayer("a", parameter(3, 6, 4), 1), lambda x, w: F.linear(x, w[0])),
        (SlicedLayer("a", parameter(3, 6, 4), 1), lambda x, w: F.linear(x, w[1].clone())),
        (SlicedLayer("a", parameter(3, 6, 4), 0), lambda x, w: F.linear(x, w.view(18, 4))),
        (Layer("a", parameter(4, 4)), lambda x, w: x @ w),
        (Layer("a", parameter(4, 4)), lambda x, w: F.linear(x, w.T)),
        (TransposedLayer("a", parameter(4, 4)), lambda x, w: F.linear(x, w)),
        (PointwiseConvLayer("a", parameter(6, 4, 1, 1)), lambda x, w: F.linear(x, w.flatten(1))),
    ],
)
def test_another_weight_is_not_taken_for_it(layer, multiply):
    seen = []
    with WeightUses([layer], before=lambda la, given: seen.append(la)):
        multiply(torch.randn(5, 4, dtype=torch.float64), layer.parameter)
    assert seen == []


@pytest.mark.parametrize(
    ("layer", "matrix"),
    [
        (TransposedLayer("a", parameter(4, 6)), lambda w: w.T),
        (SlicedLayer("a", parameter(3, 6, 4), 2), lambda w: w[2]),
        (PointwiseConvLayer("a", parameter(6, 4, 1, 1)), lambda w: w[:, :, 0, 0]),
    ],
)
def test_masks_and_weights_are_written_where_the_weight_lies_and_nowhere_else(layer, matrix):
    before = layer.parameter.detach().clone()
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    assert layer.shape == (6, 4)
    assert layer.size == 24
    assert torch.equal(layer.weight, matrix(before))
    layer.write(mask, 2 * layer.weight)
    expected = before.clone()
    matrix(expected).copy_(torch.where(mask, 2 * matrix(before), 0))
    assert torch.equal(layer.parameter, expected)


def test_further_classes_of_modules_make_layers():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(4, 6)

    module = nn.Sequential(nn.Linear(4, 4), Other(), nn.ReLU())
    assert [layer.name for layer in find_layers(module, "block")] == ["block.0"]
    layers = find_layers(module, "block", {Other: TransposedLayer})
    assert [(type(layer), layer.name) for layer in layers] == [(Layer, "block.0"), (TransposedLayer, "block.1")]
