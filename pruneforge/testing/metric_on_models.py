"""What every metric promises on whole models, one of each adapter's examples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pruneforge.interfaces.adapter import Adapter, Example
from pruneforge.interfaces.metric import Metric, Pruned, prunes_blocks, scores_layers
from pruneforge.interfaces.patterns import NM, Pattern, Scope, Unstructured, pruned_count
from pruneforge.interfaces.statistics import kind_of, streams_of
from pruneforge.runs.result import PruneResult
from pruneforge.testing.models import examples, fresh, layers_of, prune_with

HALF = 0.5


def prune_example(
    metric: Metric, adapter: Adapter, example: Example, alone: bool = False, **settings: Any
) -> tuple[nn.Module, PruneResult]:
    """Return an example's model in float64 after pruning, and the result; with `alone`, each sample is a batch."""
    module, data = fresh(example)
    if alone:
        data = [tree_map(lambda value, at=at: value[at : at + 1], one) for one in data for at in range(_size(one))]
    streams = dict.fromkeys(streams_of(metric.requires), data)
    return module, prune_with(adapter, module, metric, calibration=data, streams=streams or None, **settings)


def _size(data: Any) -> int:
    return len(data if isinstance(data, Tensor) else next(iter(data.values())))


def whole_models_are_pruned_as_asked_for(metric: Metric) -> None:
    """Check the counts at half of all weights and at 2:4, and that the weights that a mask prunes are zero."""
    scope = metric.comparison_group()
    asked: list[tuple[Pattern, dict[str, Any]]] = []
    if scope not in ("block", "model") and not metric.permutes:
        asked.append((Unstructured(HALF, scope or "layer"), {"sparsity": HALF}))
    if getattr(metric.options, "scope", None) is None:  # the engine refuses N:M within groups
        asked.append((NM(2, 4), {"pattern": "2:4"}))
    for adapter, example in examples(each=1):
        for pattern, settings in asked:
            module, result = prune_example(metric, adapter, example, **settings)
            for layer in layers_of(adapter, module):
                pruned = Pruned(result.masks[layer.name], permutation=result.permutations.get(layer.name))
                left = int(layer.matrix().masked_fill(pruned.mask, 0).count_nonzero())
                assert not left, f"{left} pruned weights of {layer.name} of {example.name} are not zero"
                if scope is not None or isinstance(pattern, NM):
                    assert pruned.fits(pattern), f"the mask of {layer.name} of {example.name} does not fit {pattern}"


def every_scope_it_allows_works(metric: Metric) -> None:
    """Check the counts within rows, layers, blocks and the model, as far as the `scope` option and the method go."""
    for scoped, scope in _scoped(metric):
        wide: dict[str, Any] = {"propagate": "dense"} if scope == "model" else {}
        for adapter, example in examples(each=1):
            module, result = prune_example(scoped, adapter, example, sparsity=HALF, **wide)
            blocks = [[result.masks[layer.name] for layer in block.layers] for block in adapter.blocks(module)]
            if scope in ("row", "layer"):
                fit = all(Unstructured(HALF, scope).fits(mask) for block in blocks for mask in block)
            else:
                groups = blocks if scope == "block" else [[mask for block in blocks for mask in block]]
                fit = all(_pruned(group) == pruned_count(sum(mask.numel() for mask in group), HALF) for group in groups)
            assert fit, f"with scope={scope} other than half of the weights of {example.name} are pruned"


def _pruned(masks: Sequence[Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks)


def _scoped(metric: Metric) -> Iterator[tuple[Metric, Scope]]:
    """Yield the metric with each scope that its options allow, where what it requires and decides allows it too."""
    scores = scores_layers(metric)
    compares = any(getattr(kind_of(required), "with_target", False) for required in metric.requires)
    unstructured = not metric.permutes and "scope" in type(metric.options).model_fields
    for scope in get_args(Scope) if unstructured else ():
        several = scope in ("block", "model")
        if (several and (not scores or prunes_blocks(metric))) or (scope == "model" and compares):
            continue
        scoped = copy.copy(metric)
        try:
            scoped.options = type(metric.options)(**{**metric.options.model_dump(), "scope": scope})
        except ValidationError:
            continue  # its options name other scopes
        if scoped.comparison_group() == scope and (scores or metric.scope is not None):
            yield scoped, scope


def batches_of_a_model_have_no_say(metric: Metric) -> None:
    """Check that a model's samples one by one give the masks that they give in batches."""
    settings: dict[str, Any] = {"pattern": "2:4"} if metric.permutes else {"sparsity": HALF}
    settings |= {"propagate": "dense"} if metric.comparison_group() == "model" else {}
    for adapter, example in examples(each=1):
        (_, together), (_, alone) = (
            prune_example(metric, adapter, example, each, **settings) for each in (False, True)
        )
        for name, mask in together.masks.items():
            said = f"the mask of {name} of {example.name} is another one if each sample is a batch of its own"
            assert torch.equal(mask, alone.masks[name]), said
