"""Masks that fit N:M with a layer's columns permuted: in memory, streamed, resumed, in several processes."""

from __future__ import annotations

import json

import commands
import experts
import pytest
import torch
from conftest import interrupted_after, outcome, tiny_llama, tokens

import pruneforge
from pruneforge import NM, Metric, Pruned, PruneForgeError, Refiner
from pruneforge.checkpoint.masks import load_masks, load_permutations, save_masks

SNAKE = {"options": {"permutation": "snake"}}


@pytest.fixture
def model(tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def batches():
    return tokens().split(3)


def fit(result, pattern, permuted=True):
    """Whether each mask fits the pattern in the order that the result keeps, or else in its own."""
    if permuted:
        assert result.permutations.keys() == result.masks.keys()
    orders = result.permutations if permuted else {}
    return [pattern.fits(mask[:, orders[name]] if permuted else mask) for name, mask in result.masks.items()]


def assert_alike(found, expected):
    assert found.masks.keys() == expected.masks.keys() == found.permutations.keys() == expected.permutations.keys()
    for name, mask in expected.masks.items():
        assert torch.equal(found.masks[name], mask), name
        assert torch.equal(found.permutations[name], expected.permutations[name]), name


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_streaming_keeps_the_order_that_a_run_in_memory_gives(pattern, model, tmp_path):
    expected = pruneforge.prune(model, "ria", None, pattern, batches(), **SNAKE)
    found = pruneforge.prune(model, "ria", None, pattern, batches(), output=tmp_path / "out", **SNAKE)
    assert_alike(found, expected)
    assert_alike(pruneforge.load(tmp_path / "out"), expected)
    n, m = map(int, pattern.split(":"))
    assert all(fit(expected, NM(n, m)))
    assert not any(fit(expected, NM(n, m), permuted=False))
    for name, order in found.permutations.items():
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(found.masks[name].shape[1]))
    weights = dict(found.model.named_parameters())
    for name, mask in found.masks.items():  # in the layer's own order, as the weights are
        assert not weights[f"{name}.weight"][~mask].any()
    said = [warning for warning in found.report["warnings"] if "permuted" in warning]
    assert said == [warning for warning in expected.report["warnings"] if "permuted" in warning]
    assert len(said) == 1
    assert said[0].startswith(f"masks fit {pattern} only with the inputs of each layer permuted")


def test_a_model_in_memory_is_written_with_its_order(tmp_path):
    found = pruneforge.prune(tiny_llama(), "ria", None, "2:4", batches(), output=tmp_path / "out", **SNAKE)
    assert_alike(pruneforge.load(tmp_path / "out"), found)


def test_other_runs_keep_no_order_and_masks_of_before_are_read(model, tmp_path):
    found = pruneforge.prune(model, "ria", None, "2:4", batches(), output=tmp_path / "out")
    assert found.permutations == pruneforge.load(tmp_path / "out").permutations == {}
    assert all(fit(found, NM(2, 4), permuted=False))
    assert not any("permuted" in warning for warning in found.report["warnings"])


def test_masks_are_read_as_they_were_written(tmp_path):
    masks = {"one": torch.rand(3, 7) > 0.5, "two": torch.rand(2, 4) > 0.5}
    orders = {"one": torch.randperm(7), "two": torch.randperm(4)}
    save_masks(masks, tmp_path, orders)
    for found, expected in ((load_masks(tmp_path), masks), (load_permutations(tmp_path), orders)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("at", [0, 1])
def test_a_resumed_run_gives_the_same_bytes(at, model, tmp_path):
    with interrupted_after(at):
        pruneforge.prune(model, "ria", None, "2:4", batches(), output=tmp_path / "out", **SNAKE)
    found = pruneforge.prune(model, "ria", None, "2:4", batches(), output=tmp_path / "out", resume=True, **SNAKE)
    whole = pruneforge.prune(model, "ria", None, "2:4", batches(), output=tmp_path / "whole", **SNAKE)
    assert outcome(tmp_path / "out") == outcome(whole.folder)
    assert sum("permuted" in warning for warning in found.report["warnings"]) == 1


def test_two_processes_keep_the_order_of_one(checkpoint, tmp_path):
    asked = (
        "prune",
        checkpoint,
        "--metric",
        "ria",
        "--pattern",
        "2:4",
        "--calibration",
        "python-docs",
        "--samples",
        "4",
    )
    asked += ("--seqlen", "64", "--batch-size", "2", "--dtype", "float64", "--permutation", "snake")
    one = commands.run(*asked, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    for done in commands.run_together(2, *asked, "--output", tmp_path / "two"):
        assert done.returncode == 0, done.stderr
    assert_alike(pruneforge.load(tmp_path / "two"), pruneforge.load(tmp_path / "one"))
    shown = commands.run("inspect", tmp_path / "two", "--json")
    assert json.loads(shown.stdout)["all"]["permuted_patterns"] == ["2:4", "4:8"]
    assert json.loads(shown.stdout)["all"]["patterns"] == []


def test_runs_in_company_keep_orders_of_their_own(model, tmp_path):
    metrics = {"plain": "ria", "dealt": "ria"}
    options = {"dealt": {"permutation": "snake"}}
    found = pruneforge.prune_each(model, metrics, ["2:4"], batches(), output=tmp_path / "all", options=options)
    plain, permuted = found["plain-2of4"], found["dealt-2of4"]
    assert plain.permutations == {}
    alone = pruneforge.prune(model, "ria", None, "2:4", batches(), propagate="dense", **SNAKE)
    assert_alike(permuted, alone)


def test_an_allocator_gives_each_layer_its_n(model):
    found = pruneforge.prune(
        model, "ria", None, "4:8", batches(), allocator="owl", allocator_options={"m": 1.5}, **SNAKE
    )
    shares = found.report["allocator"]["sparsity"]
    for name, mask in found.masks.items():
        assert NM(round(8 * (1 - shares[name])), 8).fits(mask[:, found.permutations[name]])


class Turned(Metric):
    """Magnitude, with columns in the reverse order."""

    permutes = True

    def prune_layer(self, layer, stats, pattern):
        order = torch.arange(layer.shape[1] - 1, -1, -1)
        return Pruned(pattern.select(layer.weight.abs()), permutation=self.order(order))

    def order(self, order):
        return order


class Same(Refiner):
    def refine(self, layer, stats, pruned, pattern):
        return pruned


def turned(order, **attributes):
    return type("Mine", (Turned,), {"order": lambda self, given: order(given), **attributes})()


@pytest.mark.parametrize(
    ("metric", "asked", "said"),
    [
        (Turned(), {"sparsity": 0.5}, "is asked to permute columns, which serves N:M patterns alone"),
        (Turned(), {"pattern": "2:4", "refine": Same()}, "refiner 'same' works in the layer's own order of columns"),
        (
            turned(lambda o: o, permutes=False),
            {"pattern": "2:4"},
            "permuted the columns of layer .* `permutes` is False",
        ),
        (turned(lambda o: None), {"pattern": "2:4"}, "gave no permutation for layer .* `permutes` is True"),
        (turned(lambda o: o.int()), {"pattern": "2:4"}, "made a permutation of torch.int32"),
        (turned(lambda o: o[1:]), {"pattern": "2:4"}, r"permutation of torch.int64 \(63,\) for layer .* 0 to 63 once"),
        (turned(torch.zeros_like), {"pattern": "2:4"}, "made a permutation of torch.int64"),
        (turned(lambda o: o.roll(1)), {"pattern": "2:4"}, "made a mask for layer .* that does not fit 2:4"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_does_not_go_together_is_named(metric, asked, said, model, tmp_path):
    with pytest.raises(PruneForgeError, match=said) as error:
        pruneforge.prune(model, metric, output=tmp_path / "out", **asked)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_of_an_unstructured_pattern_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(PruneForgeError, match="ask for N:M, or for no permutation"):
        pruneforge.prune(tmp_path / "no model", "ria", 0.5, **SNAKE)


def test_a_layer_that_no_token_reaches_keeps_its_order():
    with experts.registered():
        found = pruneforge.prune(experts.tiny(), "ria", None, "2:4", [tokens()], **SNAKE)
    missed = f"model.layers.1.mlp.experts.down_proj.{experts.MISSED}"
    assert found.masks[missed].all()
    own = [name for name, order in found.permutations.items() if torch.equal(order, torch.arange(len(order)))]
    assert missed in own
    assert len(own) < len(found.permutations) == len(found.masks)
