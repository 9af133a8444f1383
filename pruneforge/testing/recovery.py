"""What every recovery promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.interfaces.adapter import Adapter, Example
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.recovery import Recovery
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.runs.prune import prune
from pruneforge.testing.kit import Kit, by_name
from pruneforge.testing.models import examples, fresh, layers_of, readable


def recovered(
    recovery: Recovery | None,
    example: Example,
    sparsity: float | None = 0.5,
    pattern: str | None = None,
    **settings: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return an example's model after pruning by magnitudes and recovering, and its masks."""
    module, data = fresh(example, settings.pop("in_dtype", torch.float64))
    result = prune(module, _Magnitudes(), sparsity, pattern, data, recover=recovery, **settings)
    return module, result.masks


class _Magnitudes(Metric):
    """The absolute value of the weight, so that masks do not depend on what earlier blocks became."""

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return |weight| [out, in]."""
        return layer.weight.abs()


def pruned_weights_stay_zero(recovery: Recovery) -> None:
    """Check weights and masks at 50 % and 2:4."""
    for adapter, example in examples(each=1):
        for sparsity, pattern in ((0.5, None), (None, "2:4")):
            module, masks = recovered(recovery, example, sparsity, pattern)
            _, expected = recovered(None, example, sparsity, pattern)
            for layer in layers_of(adapter, module):
                said = f"{layer.name} of {example.name}"
                assert torch.equal(masks[layer.name], expected[layer.name]), f"the mask of {said} has changed"
                moved = int(layer.matrix().masked_fill(masks[layer.name], 0).count_nonzero())
                assert not moved, f"{moved} pruned weights of {said} are not zero"


def models_come_nearer_to_the_dense_one(recovery: Recovery) -> None:
    """Check that outputs on the calibration data are nearer to the dense model's than without recovery."""
    for adapter, example in examples(each=1):
        dense, data = fresh(example)
        plain, near = (recovered(each, example, 0.6)[0] for each in (None, recovery))
        goal, before, after = (_outputs(adapter, module, data) for module in (dense, plain, near))
        assert (after - goal).norm() < (before - goal).norm(), f"{example.name} is not nearer to the dense model"


def a_dense_model_stays_as_it_is(recovery: Recovery) -> None:
    """Check that a model of which nothing is pruned changes by a thousandth at most."""
    for _, example in examples(each=1):
        module, _ = recovered(recovery, example, 0.0)
        for name, one, two in _pairs(module, fresh(example)[0]):
            assert (one - two).norm() <= 1e-3 * two.norm() + 1e-6, f"{name} of {example.name} changes for nothing"


def stem_and_head_and_excluded_layers_stay(recovery: Recovery) -> None:
    """Check everything outside of the blocks, and a layer that the user leaves dense."""
    for adapter, example in examples(each=1):
        left = layers_of(adapter, example.module)[0]
        module, _ = recovered(recovery, example, exclude=[left.name])
        inside = {id(p) for block in adapter.blocks(module) for p in block.module.parameters()}
        fixed = {id(layer.parameter) for layer in layers_of(adapter, module) if layer.name == left.name}
        for (name, one, two), parameter in zip(_pairs(module, fresh(example)[0]), module.parameters(), strict=True):
            if id(parameter) not in inside or id(parameter) in fixed:
                assert torch.equal(one, two), f"{name} of {example.name} changes, and is not the recovery's to change"


def the_same_seed_gives_the_same_weights(recovery: Recovery) -> None:
    """Check that two runs of one seed agree to the bit."""
    for _, example in examples(each=1):
        one, two = (recovered(recovery, example)[0] for _ in range(2))
        for name, first, second in _pairs(one, two):
            assert torch.equal(first, second), f"{name} of {example.name} differs between two runs of one seed"


def narrow_dtypes_work(recovery: Recovery) -> None:
    """Check that a bfloat16 model keeps its dtype and stays finite."""
    for _, example in examples(each=1):
        module, _ = recovered(recovery, example, in_dtype=torch.bfloat16)
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.bfloat16, f"{name} of {example.name} becomes {parameter.dtype}"
            assert parameter.isfinite().all(), f"{name} of {example.name} is not finite"


@torch.no_grad()
def _outputs(adapter: Adapter, module: nn.Module, data: list[Any]) -> Tensor:
    """Return all outputs of a model, without those at padding."""
    outputs = []
    for given in data:
        batch = adapter.batch(given, module)
        outputs += [value.flatten() for value in readable(adapter.forward(module, batch), batch)]
    return torch.cat(outputs)


def _pairs(one: nn.Module, two: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        yield name, first.detach(), second.detach()


KIT = Kit(
    by_name(
        pruned_weights_stay_zero,
        models_come_nearer_to_the_dense_one,
        a_dense_model_stays_as_it_is,
        stem_and_head_and_excluded_layers_stay,
        the_same_seed_gives_the_same_weights,
        narrow_dtypes_work,
    )
)
