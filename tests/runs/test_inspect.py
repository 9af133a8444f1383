"""What `inspect` and `diff` say of pruned models."""

from __future__ import annotations

import json
import statistics

import commands
import numpy as np
import pytest
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.engine.structure import random_structure, structure_of, together


def two_way(mask):
    """The shares of variance that rows and columns explain, value by value."""
    values = np.asarray(mask, dtype=float)
    mean = values.mean()
    total = sum((value - mean) ** 2 for value in values.ravel())
    rows = sum((values[i].mean() - mean) ** 2 for i in range(len(values)) for _ in values[i])
    columns = sum((values[:, j].mean() - mean) ** 2 for j in range(values.shape[1]) for _ in values)
    return rows / total, columns / total, total


def test_structure_is_the_variance_that_rows_and_columns_explain():
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 9), (12, 4), (1, 7)):
        mask = torch.rand(shape, generator=generator) > torch.rand(shape[0], 1, generator=generator)
        found = structure_of(mask)
        assert (found.rows, found.columns, found.variance) == pytest.approx(two_way(mask))
    whole_rows = torch.zeros(6, 8, dtype=torch.bool)
    whole_rows[::2] = True
    assert (structure_of(whole_rows).rows, structure_of(whole_rows).columns) == pytest.approx((1, 0))
    assert structure_of(torch.ones(3, 4, dtype=torch.bool)).variance == 0
    mask = torch.arange(24 * 40).view(24, 40) % 5 == 0
    generator = torch.Generator().manual_seed(0)
    shuffled = [mask.flatten()[torch.randperm(960, generator=generator)].view(24, 40) for _ in range(400)]
    expected = random_structure(mask)
    assert expected.rows == pytest.approx(statistics.fmean(structure_of(each).rows for each in shuffled), rel=0.05)
    assert expected.columns == pytest.approx(
        statistics.fmean(structure_of(each).columns for each in shuffled), rel=0.05
    )


def test_structures_are_weighted_by_their_variance():
    full, half = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    full[0] = True
    half[:, ::2] = True
    assert together(map(structure_of, [full, half])).rows == pytest.approx(0.5)
    assert together([structure_of(full), structure_of(torch.ones(9, 9, dtype=torch.bool))]).rows == pytest.approx(1)


@pytest.fixture
def outputs(tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    pruneforge.prune(tmp_path / "model", "magnitude", 0.5, output=tmp_path / "first")
    pruneforge.prune(tmp_path / "model", "wanda", None, "2:4", tokens().split(3), output=tmp_path / "second")
    return tmp_path / "first", tmp_path / "second"


def test_masks_are_described_by_layer_and_by_role(outputs):
    first, second = (pruneforge.inspect(folder) for folder in outputs)
    masks = pruneforge.load(outputs[0]).masks
    assert first["layers"].keys() == masks.keys()
    assert set(first["components"]) == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    } | {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    assert first["components"]["mlp.up_proj"]["weights"] == 3 * 64 * 160
    assert (first["all"]["patterns"], second["all"]["patterns"]) == ([], ["2:4", "4:8"])
    assert second["all"]["rows"] == 0  # each row keeps the same
    assert second["all"]["sparsity"] == first["all"]["sparsity"] == 0.5
    name = "model.layers.0.mlp.down_proj"
    assert first["layers"][name]["columns"] == pytest.approx(two_way(masks[name])[1])
    weights = sum(mask.numel() for mask in masks.values())
    assert first["bytes"]["dense"] == 4 * weights
    assert first["bytes"]["packed"] == 2 * weights + weights // 8
    assert first["bytes"]["masks"] == weights // 8


def test_masks_are_compared_with_anothers(outputs, tmp_path):
    one, two = (pruneforge.load(folder).masks for folder in outputs)
    found = pruneforge.inspect(outputs[0], against=outputs[1])["agreement"]
    pruned = [
        {(name, *place) for name, mask in masks.items() for place in (~mask).nonzero().tolist()} for masks in (one, two)
    ]
    total = sum(mask.numel() for mask in one.values())
    assert found["jaccard"] == pytest.approx(len(pruned[0] & pruned[1]) / len(pruned[0] | pruned[1]))
    assert found["same"] == pytest.approx(1 - len(pruned[0] ^ pruned[1]) / total)
    assert pruneforge.inspect(outputs[0], against=outputs[0])["agreement"]["same"] == 1
    tiny_llama(torch.float32, num_hidden_layers=2).save_pretrained(tmp_path / "smaller")
    pruneforge.prune(tmp_path / "smaller", "magnitude", 0.5, output=tmp_path / "third")
    with pytest.raises(PruneForgeError, match="cannot be compared: layer"):
        pruneforge.inspect(outputs[0], against=tmp_path / "third")


def test_two_runs_differ_in_words(outputs):
    lines = pruneforge.diff(*outputs)
    assert "recipe metric: magnitude and wanda" in lines
    assert "recipe pattern: nothing and 2:4" in lines
    assert not any(line.startswith(("measured", "identity")) for line in lines)
    assert pruneforge.diff(outputs[0], outputs[0]) == []


def test_the_commands_print_and_refuse(outputs, tmp_path):
    shown = commands.invoke("inspect", outputs[1], "--against", outputs[0], "--layers")
    assert shown.exit_code == 0, shown.output
    assert "2:4, 4:8" in shown.output
    assert "model.layers.2.mlp.down_proj" in shown.output
    assert "of the weights are kept or pruned alike" in shown.output
    as_json = commands.invoke("inspect", outputs[1], "--json")
    assert json.loads(as_json.output)["all"]["sparsity"] == 0.5
    assert "metric name: magnitude and wanda" in commands.invoke("diff", *outputs).output
    assert "differ in nothing" in commands.invoke("diff", outputs[0], outputs[0]).output
    (tmp_path / "empty").mkdir()
    for place, said in (
        (tmp_path / "empty", "is not the output of a pruning run"),
        (tmp_path, "pruned models; name one"),
    ):
        for command in (("inspect", place), ("diff", place, outputs[0])):
            refused = commands.invoke(*command)
            assert refused.exit_code == 2
            assert said in refused.output
