"""What every allocator promises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.engine.allocation import within_budget
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.allocator import Allocator, measures_blocks
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.patterns import NM, Pattern, Unstructured, pruned_count
from pruneforge.testing.kit import Kit, by_name
from pruneforge.testing.samples import sample

SHARE = 0.6


def blocks() -> list[Block]:
    """Return three blocks of two layers each, of different sizes."""
    made = []
    for index, width in enumerate((12, 24, 36)):
        layers = []
        for part in ("first", "second"):
            layer = sample((width, 32), seed=10 * index + len(part)).layer()
            layers.append(replace(layer, name=f"blocks.{index}.{part}"))
        made.append(Block(f"blocks.{index}", nn.Identity(), tuple(layers)))
    return made


def measured(allocator: Allocator, made: list[Block]) -> dict[str, dict[str, Any]]:
    """Return what an allocator measures, by block name."""
    measures = {}
    for index, block in enumerate(made if measures_blocks(allocator) else ()):
        data = sample(seed=index)
        stats = {
            layer.name: replace(data, weight=layer.weight).statistics(allocator.requires) for layer in block.layers
        }
        with torch.no_grad():
            measures[block.name] = allocator.measure(block, stats, _magnitude)
    return measures


def _magnitude(layer: Layer) -> Tensor:
    return layer.weight.abs()


def sizes(made: list[Block]) -> dict[str, dict[str, int]]:
    """Return the number of weights of each layer, by block."""
    return {block.name: {layer.name: layer.size for layer in block.layers} for block in made}


def allocate(allocator: Allocator, share: float = SHARE) -> Mapping[str, float]:
    """Return the sparsity of each layer."""
    made = blocks()
    return allocator.allocate(measured(allocator, made), sizes(made), share)


def every_layer_has_a_sparsity(allocator: Allocator) -> None:
    """Check that all layers have a number from 0 to 1, at several sparsities."""
    for share in (0.0, 0.3, SHARE, 0.9):
        given = allocate(allocator, share)
        for block in blocks():
            for layer in block.layers:
                value = given.get(layer.name)
                assert isinstance(value, int | float), f"layer {layer.name} has the sparsity {value!r}"
                assert 0 <= value <= 1, f"layer {layer.name} has the sparsity {value!r}, which is not from 0 to 1"


def the_budget_can_be_met(allocator: Allocator) -> None:
    """Check that the allocation, shifted by the engine, prunes as many weights as asked for."""
    layers = [layer for block in blocks() for layer in block.layers]
    total = sum(layer.size for layer in layers)
    for pattern in (Unstructured(SHARE), Unstructured(SHARE, "layer"), NM(2, 4)):
        steps = within_budget(allocate(allocator, pattern.sparsity), layers, pattern)
        each: Pattern = pattern
        pruned = sum(steps[layer.name] * each.steps(layer.shape)[1] for layer in layers)
        left = pruned_count(total, pattern.sparsity) - pruned
        assert 0 <= left < max(each.steps(layer.shape)[1] for layer in layers), (
            f"{pattern}: {left} weights are left over"
        )


def measures_are_what_json_holds(allocator: Allocator) -> None:
    """Check that measures mean the same once they were written as JSON and read again."""
    made = blocks()
    measures = measured(allocator, made)
    read = json.loads(json.dumps(measures))
    first, second = (allocator.allocate(each, sizes(made), SHARE) for each in (measures, read))
    assert first == second, "what `measure` returns is not the same once it was written as JSON and read again"


def the_same_twice(allocator: Allocator) -> None:
    """Check that two calls give the same."""
    assert allocate(allocator) == allocate(allocator), "two calls give two allocations"


KIT = Kit(
    by_name(
        every_layer_has_a_sparsity,
        the_budget_can_be_met,
        measures_are_what_json_holds,
        the_same_twice,
    )
)
