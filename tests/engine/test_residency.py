"""The engine touches weights only where it visits them, on any device."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import run_of, tiny_llama, tokens

import pruneforge
from pruneforge.engine.chain import Chain
from pruneforge.engine.loop import prune_blocks
from pruneforge.interfaces.adapter import Adapter
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]


class Hidden:
    """A residency that takes weights away wherever nobody visits them, and holds one block at a time."""

    device = torch.device("cpu")

    def __init__(self, model, blocks):
        inside = {id(p) for block in blocks for p in block.module.parameters()}
        self.outside = [p for p in model.parameters() if id(p) not in inside]
        self.away = {}
        self.resident = 0
        for block in blocks:
            self.put_away(list(block.module.parameters()))
        self.put_away(self.outside)

    def put_away(self, parameters):
        for parameter in parameters:
            self.away[id(parameter)] = parameter.data.clone()
            parameter.data.fill_(torch.nan)

    @contextmanager
    def present(self, parameters):
        for parameter in parameters:
            parameter.data.copy_(self.away.pop(id(parameter)))
        try:
            yield
        finally:
            self.put_away(parameters)

    @contextmanager
    def stem_and_head(self):
        with self.present(self.outside):
            yield

    @contextmanager
    def visit(self, block, pruned=False):
        self.resident += 1
        assert self.resident <= 2  # the pruned block before, while batches run on through this one
        with self.present(list(block.module.parameters())):
            yield
        self.resident -= 1


@pytest.mark.parametrize(
    ("scope", "propagate"), [(None, "pruned"), (None, "dense"), ("block", "pruned"), ("model", "dense")]
)
@pytest.mark.parametrize("metric", METRICS)
def test_weights_are_needed_only_while_their_block_is_visited(metric, scope, propagate):
    if scope and metric == "sparsegpt":
        pytest.skip("chooses its own comparison groups")
    model = tiny_llama()
    options = {"scope": scope} if scope else {}
    expected = pruneforge.prune(
        copy.deepcopy(model), metric, 0.5, None, tokens().split(3), options=options, propagate=propagate
    )
    registry = loaded_plugins().registry
    adapter: Adapter = registry.create("adapter", "llama")
    chosen = registry.create("metric", metric, options)
    blocks = adapter.blocks(model)
    run = run_of(chosen, blocks, propagate=propagate)
    batches = [adapter.batch(ids, model) for ids in tokens().split(3)]
    residency = Hidden(model, blocks)
    results = []
    masks = {}

    def look(run, result):
        results.append(result)

    prune_blocks([run], Chain(model, adapter, blocks, residency), {"": batches}, Progress(), look)
    assert [result.index for result in results] == [0, 1, 2]
    for result in results:
        masks |= result.masks
    for name, mask in expected.masks.items():
        assert torch.equal(masks[name], mask), name
    for ours, theirs in zip(model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(residency.away[id(ours)], theirs.data)
