"""What every recovery promises."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn, optim

from pruneforge.engine.model_recovery import PrunedModel
from pruneforge.interfaces.adapter import Adapter, Example
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.recovery import Recovery, recovers_models
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.numerics import exact_arithmetic
from pruneforge.runs.prune import prune
from pruneforge.testing.kit import CheckFunction, Kit, by_name
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


def of_blocks(check: CheckFunction) -> CheckFunction:
    """Return a check that passes for recoveries that change more than blocks."""

    @wraps(check)
    def run(recovery: Recovery) -> None:
        if not recovers_models(recovery):
            check(recovery)

    return run


def of_models(check: CheckFunction) -> CheckFunction:
    """Return a check that passes for recoveries that change blocks alone."""

    @wraps(check)
    def run(recovery: Recovery) -> None:
        if recovers_models(recovery):
            check(recovery)

    return run


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


@of_blocks
def models_come_nearer_to_the_dense_one(recovery: Recovery) -> None:
    """Check that outputs on the calibration data are nearer to the dense model's than without recovery."""
    for adapter, example in examples(each=1):
        dense, data = fresh(example)
        plain, near = (recovered(each, example, 0.6)[0] for each in (None, recovery))
        goal, before, after = (_outputs(adapter, module, data) for module in (dense, plain, near))
        assert (after - goal).norm() < (before - goal).norm(), f"{example.name} is not nearer to the dense model"


@of_models
def the_loss_on_the_calibration_data_falls(recovery: Recovery) -> None:
    """Check that the mean loss is smaller than without recovery."""
    for adapter, example in examples(each=1):
        before, after = (_loss(adapter, example, recovered(each, example, 0.6)[0]) for each in (None, recovery))
        assert after < before, f"the loss of {example.name} is {after:.4f}, and {before:.4f} without recovery"


@of_models
def one_that_was_stopped_goes_on_to_the_same_weights(recovery: Recovery) -> None:
    """Check that a recovery which stops in the middle, and goes on in another process, ends as one that does not."""
    for adapter, example in examples(each=1):
        module, masks = recovered(None, example)
        _, data = fresh(example)
        batches = [adapter.batch(given, module) for given in data]

        def train(stop: int | None, state: Path, pruned: nn.Module) -> tuple[nn.Module, int]:
            again = copy.deepcopy(pruned)
            site = _Stopping(again, adapter, masks, batches, torch.device("cpu"), state=state)  # noqa: B023 -- used here
            site.left = stop
            with exact_arithmetic(0, torch.device("cpu")):
                try:
                    return again, int(site.recover(recovery).facts["steps"])
                except _Stop:
                    return again, 0

        with TemporaryDirectory() as folder:
            whole, steps = train(None, Path(folder) / "whole", module)
            train(max(1, 2 * steps // 3), Path(folder) / "stopped", module)
            resumed, _ = train(None, Path(folder) / "stopped", module)
        for name, one, two in _pairs(whole, resumed):
            assert torch.equal(one, two), f"{name} of {example.name} differs once it was stopped"


class _Stop(BaseException):
    """Ends a recovery as a signal would, which no plugin may catch."""


class _Stopping(PrunedModel):
    """A site that ends the recovery in place of a step.

    Attributes:
        left: Steps until then; `None` for never.
    """

    left: int | None = None

    def step(self, optimizer: optim.Optimizer) -> None:
        """Take a step, or end."""
        if self.left is not None:
            if not self.left:
                raise _Stop
            self.left -= 1
        super().step(optimizer)


@of_blocks
def a_dense_model_stays_as_it_is(recovery: Recovery) -> None:
    """Check that a model of which nothing is pruned changes by a thousandth at most."""
    for _, example in examples(each=1):
        module, _ = recovered(recovery, example, 0.0)
        for name, one, two in _pairs(module, fresh(example)[0]):
            assert (one - two).norm() <= 1e-3 * two.norm() + 1e-6, f"{name} of {example.name} changes for nothing"


def stem_and_head_and_excluded_layers_stay(recovery: Recovery) -> None:
    """Check a layer that the user leaves dense, and without recovery of the whole model all outside of the blocks."""
    for adapter, example in examples(each=1):
        left = layers_of(adapter, example.module)[0]
        module, _ = recovered(recovery, example, exclude=[left.name])
        inside = {id(p) for block in adapter.blocks(module) for p in block.module.parameters()}
        fixed = {id(layer.parameter) for layer in layers_of(adapter, module) if layer.name == left.name}
        for (name, one, two), parameter in zip(_pairs(module, fresh(example)[0]), module.parameters(), strict=True):
            outside = id(parameter) not in inside and not recovers_models(recovery)
            if outside or id(parameter) in fixed:
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


@torch.no_grad()
def _loss(adapter: Adapter, example: Example, module: nn.Module) -> float:
    """Return the mean loss of a model's samples."""
    _, data = fresh(example)
    batches = [adapter.batch(given, module) for given in data]
    losses = [adapter.losses(adapter.forward(module, batch), batch) for batch in batches]
    return float(torch.cat(losses).mean())


def _pairs(one: nn.Module, two: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        yield name, first.detach(), second.detach()


KIT = Kit(
    by_name(
        pruned_weights_stay_zero,
        models_come_nearer_to_the_dense_one,
        the_loss_on_the_calibration_data_falls,
        one_that_was_stopped_goes_on_to_the_same_weights,
        a_dense_model_stays_as_it_is,
        stem_and_head_and_excluded_layers_stay,
        the_same_seed_gives_the_same_weights,
        narrow_dtypes_work,
    )
)
