"""A metric with an allocator and refiners: in memory, streamed, resumed, in several processes, at every pattern."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import commands
import pytest
import reference
import torch
from conftest import interrupted_after, outcome, tiny_llama, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import pruneforge
from pruneforge import Allocator, Pruned, PruneForgeError, Refiner
from pruneforge.engine.allocation import within_budget
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.patterns import NM, Unstructured, pruned_count
from pruneforge.plugins import loaded_plugins

ALLOCATORS = ("owl", "erk", "alphapruning", "lsa", "dlp")
METRICS = ("magnitude", "wanda", "sparsegpt", "gblm", "ria", "admm")


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def batches():
    return tokens().split(3)


def owl(dense, samples, sparsity, lam=0.08, m=5.0) -> dict[str, float]:
    """Each block's sparsity as the paper writes it, from the dense model run one sample at a time."""
    kind, outliers = reference.LanguageModel, []
    for name, block in kind.blocks(dense):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(kind, dense, layers, samples)
        scores = torch.cat(
            [
                (module.weight.abs() * (torch.cat(inputs[layer]).square().sum(0) / len(samples)).sqrt()).flatten()
                for layer, module in layers
            ]
        )
        outliers.append(100 * (scores > m * scores.mean()).double().mean())
    ratios = torch.stack(outliers)
    ratios = (ratios - ratios.min()) * 2 * lam / (ratios.max() - ratios.min())
    ratios = ratios - ratios.mean() + (1 - sparsity)
    return {name: 1 - float(ratio) for (name, _), ratio in zip(kind.blocks(dense), ratios, strict=True)}


def test_owl_gives_each_block_the_sparsity_of_the_paper_and_keeps_the_budget():
    dense, ids = tiny_llama(), tokens()
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    expected = owl(dense, samples, 0.6, m=1.5)
    found = pruneforge.prune(
        tiny_llama(), "magnitude", 0.6, calibration=[ids], allocator="owl", allocator_options={"m": 1.5}
    )
    for name, layer in found.report["layers"].items():
        block = next(block for block in expected if name.startswith(f"{block}."))
        assert layer["sparsity"] == pytest.approx(expected[block], abs=1 / 4096 + 1e-6)  # of the smallest layer
    total = sum(mask.numel() for mask in found.masks.values())
    assert sum(int((~mask).sum()) for mask in found.masks.values()) == pruned_count(total, 0.6)
    assert len(set(expected.values())) == 3


@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6).map(lambda n: 8 * n)), min_size=1, max_size=6),
    sparsity=st.floats(0, 0.99),
    shares=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    pattern=st.sampled_from(["row", "layer", NM(4, 8), NM(6, 8), NM(2, 4)]),
)
@settings(deadline=None, max_examples=60)
def test_the_budget_is_met_to_the_last_step(shapes, sparsity, shares, pattern):
    asked_pattern = Unstructured(sparsity, pattern) if isinstance(pattern, str) else pattern
    layers = [Layer(str(n), torch.nn.Parameter(torch.empty(shape))) for n, shape in enumerate(shapes)]
    allocation = within_budget(dict(zip(map(str, range(6)), shares, strict=True)), layers, asked_pattern)
    budget = pruned_count(sum(layer.parameter.numel() for layer in layers), asked_pattern.sparsity)
    steps = {layer.name: asked_pattern.steps(layer.shape) for layer in layers}
    pruned = sum(allocation[name] * each for name, (_, each) in steps.items())
    assert all(0 <= allocation[name] <= most for name, (most, _) in steps.items())
    assert pruned <= budget
    room = [each for name, (most, each) in steps.items() if allocation[name] < most]
    assert not room or budget - pruned < min(room)
    for layer in layers:
        own = asked_pattern.at(allocation[layer.name], layer.shape)
        mask = own.select(torch.rand(layer.shape))
        assert int((~mask).sum()) == allocation[layer.name] * steps[layer.name][1]
        assert own.fits(mask)


@pytest.mark.parametrize("scope", ["row", "layer", "block"])
@pytest.mark.parametrize("pattern", [0.55, "4:8"])
def test_an_allocation_holds_at_every_scope_and_pattern(scope, pattern, model, tmp_path):
    if pattern == "4:8" and scope != "row":
        pytest.skip("N:M compares within groups")
    options = {} if pattern == "4:8" else {"scope": scope}
    shares = {"*.0.*": 0.3, "*.mlp.*": 0.7, "*": 0.5}
    (tmp_path / "shares.yaml").write_text(json.dumps(shares))
    sparsity, text = (None, pattern) if isinstance(pattern, str) else (pattern, None)
    common = {"allocator": f"file:{tmp_path / 'shares.yaml'}", "options": options}
    found = pruneforge.prune(model, "wanda", sparsity, text, batches(), output=tmp_path / "out", **common)
    layers = found.report["layers"]
    total = sum(mask.numel() for mask in found.masks.values())
    pruned = sum(layer["pruned"] for layer in layers.values())
    # The least step of a layer is one weight of each row, or of each group of eight.
    step = (
        {"row": 64, "layer": 1, "block": 1}[scope]
        if text is None
        else min(m.numel() for m in found.masks.values()) // 8
    )
    assert 0 <= pruned_count(total, 0.5 if text else 0.55) - pruned < step
    assert layers["model.layers.0.self_attn.q_proj"]["sparsity"] < layers["model.layers.1.self_attn.q_proj"]["sparsity"]
    if scope != "block":
        assert layers["model.layers.1.mlp.up_proj"]["sparsity"] > layers["model.layers.1.self_attn.q_proj"]["sparsity"]
    # The report of one run is the allocation of another.
    again = {**common, "allocator": f"file:{tmp_path / 'out' / 'pruneforge.json'}"}
    repeated = pruneforge.prune(model, "wanda", sparsity, text, batches(), output=tmp_path / "again", **again)
    if scope != "block":
        assert all(torch.equal(repeated.masks[name], mask) for name, mask in found.masks.items())


def test_uniform_allocation_changes_nothing_where_every_layer_is_divided_evenly(model):
    plain = pruneforge.prune(model, "wanda", 0.5, None, batches())
    uniform = pruneforge.prune(model, "wanda", 0.5, None, batches(), allocator="uniform")
    assert all(torch.equal(uniform.masks[name], mask) for name, mask in plain.masks.items())


@pytest.mark.parametrize(("metric", "propagate"), itertools.product(METRICS, ["pruned", "dense"]))
def test_streaming_gives_what_a_run_in_memory_gives(metric, propagate, model, tmp_path):
    asked = {"allocator": "owl", "refine": "sparseswaps", "propagate": propagate, "allocator_options": {"m": 1.5}}
    expected = pruneforge.prune(model, metric, 0.6, None, batches(), **asked)
    found = pruneforge.prune(model, metric, 0.6, None, batches(), output=tmp_path / "out", memory_budget="1TB", **asked)
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    allocator = found.report["allocator"]
    assert (allocator["name"], allocator["options"]) == ("owl", {"lam": 0.08, "m": 1.5})
    assert allocator["sparsity"].keys() == found.masks.keys()
    assert [refiner["name"] for refiner in found.report["refiners"]] == ["sparseswaps"]


@pytest.mark.parametrize("pattern", [0.6, "2:4", "8:16"])
@pytest.mark.parametrize(("metric", "allocator"), itertools.product(["wanda", "sparsegpt"], ALLOCATORS))
def test_every_allocator_keeps_the_budget_and_is_the_same_streamed(metric, allocator, pattern, model, tmp_path):
    sparsity, text = (None, pattern) if isinstance(pattern, str) else (pattern, None)
    asked = (model, metric, sparsity, text, batches())
    expected = pruneforge.prune(*asked, allocator=allocator)
    found = pruneforge.prune(*asked, allocator=allocator, output=tmp_path / "out", memory_budget="1TB")
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    sizes = [mask.numel() for mask in found.masks.values()]
    left = pruned_count(sum(sizes), 0.5 if text else 0.6) - sum(int((~mask).sum()) for mask in found.masks.values())
    if text:
        assert left == 0
    else:  # a step is a weight of each row, of 32 at least; SparseGPT rounds down in the column blocks of three layers
        assert 0 <= left <= {"wanda": 31, "sparsegpt": 3}[metric]
    if text != "2:4":  # steps of a quarter are too coarse for most allocations
        assert len({layer["sparsity"] for layer in found.report["layers"].values()}) > 1


@pytest.mark.parametrize(("at", "allocator"), [(0, "owl"), *((1, name) for name in ALLOCATORS)])
def test_a_resumed_run_allocates_once_and_gives_the_same_bytes(at, allocator, model, tmp_path, monkeypatch):
    asked = {"allocator": allocator, "refine": ["sparseswaps"]}
    with interrupted_after(at):
        pruneforge.prune(model, "wanda", 0.6, None, batches(), output=tmp_path / "out", **asked)
    whole = pruneforge.prune(model, "wanda", 0.6, None, batches(), output=tmp_path / "whole", **asked)

    def measure(self, block, stats, score):
        raise AssertionError("measured again")

    monkeypatch.setattr(loaded_plugins().registry.get("allocator", allocator).load(), "measure", measure)
    pruneforge.prune(model, "wanda", 0.6, None, batches(), output=tmp_path / "out", resume=True, **asked)
    assert outcome(tmp_path / "out") == outcome(whole.folder)


def test_two_processes_allocate_and_refine_alike(checkpoint, tmp_path):
    asked = ("prune", checkpoint, "--metric", "wanda", "--sparsity", "0.6", "--calibration", "python-docs")
    asked += ("--samples", "4", "--seqlen", "64", "--batch-size", "2", "--dtype", "float64", "--allocator", "owl")
    asked += ("--refine", "sparseswaps", "--m", "3")
    one = commands.run(*asked, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    for done in commands.run_together(2, *asked, "--output", tmp_path / "two"):
        assert done.returncode == 0, done.stderr
    first, second = pruneforge.load(tmp_path / "one"), pruneforge.load(tmp_path / "two")
    assert first.report["recipe"]["allocator_options"] == {"m": 3.0}
    assert all(torch.equal(second.masks[name], mask) for name, mask in first.masks.items())


@pytest.mark.parametrize("allocator", ["erk", "alphapruning"])
@pytest.mark.parametrize("streamed", [False, True])
def test_allocators_that_look_at_weights_alone_need_no_data_and_pass_none(allocator, streamed, model, tmp_path):
    def refuse(module, _):
        raise AssertionError(f"{type(module).__name__} was run")

    refusing = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        output = {"output": tmp_path / "out"} if streamed else {}
        found = pruneforge.prune(model, "magnitude", 0.6, allocator=allocator, **output)
    finally:
        refusing.remove()
    total = sum(mask.numel() for mask in found.masks.values())
    assert sum(int((~mask).sum()) for mask in found.masks.values()) == pruned_count(total, 0.6)
    assert found.report["calibration"] is None


@pytest.mark.parametrize("allocator", ["erk", "alphapruning"])
def test_no_data_pass_the_model_for_them_beside_a_metric_that_needs_data(allocator, model):
    runs: list[str] = []
    counting = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: runs.append("run"))
    try:
        pruneforge.prune(model, "wanda", 0.6, None, batches())
        plain = len(runs)
        pruneforge.prune(model, "wanda", 0.6, None, batches(), allocator=allocator)
    finally:
        counting.remove()
    assert len(runs) == 2 * plain > 0


class Dropping(Refiner):
    """Prunes one weight too many."""

    def refine(self, layer, stats, pruned, pattern):
        mask = pruned.mask.clone()
        mask[0] = False
        return Pruned(mask)


class Halves(Allocator):
    """Says nothing of the layers but one."""

    def allocate(self, measures, sizes, sparsity):
        return {"model.layers.0.self_attn.q_proj": 2.0}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"allocator": "owel"}, "unknown allocator 'owel'; did you mean 'owl'"),
        ({"refine": "sparseswap"}, "unknown refiner 'sparseswap'; did you mean 'sparseswaps'"),
        ({"allocator_options": {"lam": 1}}, "allocator options need the name of what they belong to; add `allocator`"),
        ({"refine_options": {"steps": 1}}, "refine options need a refiner"),
        ({"allocator": "owl", "allocator_options": {"lam": 2}}, "option lam=2 of owl"),
        ({"allocator": "owl", "calibration": None}, "allocator 'owl' needs calibration data"),
        ({"refine": "sparseswaps", "calibration": None}, "refiner 'sparseswaps' needs calibration data"),
        ({"allocator": "owl", "options": {"scope": "model"}}, "scope=model chooses each layer's sparsity itself"),
        ({"allocator": Halves()}, r"gives layer 'model.layers.0.self_attn.q_proj' the sparsity 2.0"),
        ({"refine": Dropping()}, r"refiner 'dropping' made a mask for layer .* that does not fit"),
        ({"allocator": "file:none.yaml"}, "allocation 'none.yaml' does not exist"),
    ],
)
def test_what_does_not_go_together_is_named(asked, said, model):
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(model, "magnitude", 0.5, **{"calibration": batches(), **asked})


class Drawn(Allocator):
    """Sparsities at random, and a measure that is drawn too."""

    def measure(self, block, stats, score):
        return {"drawn": float(torch.rand(1))}

    def allocate(self, measures, sizes, sparsity):
        return {
            name: sparsity * (0.5 * measures[block]["drawn"] + float(torch.rand(1)) / 2)
            for block, layers in sizes.items()
            for name in layers
        }


def test_random_allocations_do_not_depend_on_what_shares_the_pass(model, tmp_path):
    asked = {"allocator": Drawn(), "propagate": "dense"}
    together = pruneforge.prune_each(model, ["random", "magnitude"], [0.5], output=tmp_path / "all", **asked)
    alone = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "alone", **asked)
    found = together["magnitude-0.5"]
    assert all(torch.equal(found.masks[name], mask) for name, mask in alone.masks.items())


def test_one_solver_with_two_options_in_one_pass_gives_what_each_gives_alone(model, tmp_path):
    metrics = {"little": "sparsegpt", "much": "sparsegpt"}
    options = {"little": {"damping": 0.01}, "much": {"damping": 1.0}}
    together = pruneforge.prune_each(model, metrics, [0.5], batches(), output=tmp_path / "all", options=options)
    for label in metrics:
        alone = pruneforge.prune(
            model, "sparsegpt", 0.5, None, batches(), options=options[label], propagate="dense", output=tmp_path / label
        )
        assert outcome(together[f"{label}-0.5"].folder) == outcome(alone.folder)
    little, much = (together[f"{label}-0.5"].masks for label in metrics)
    assert any(not torch.equal(little[name], mask) for name, mask in much.items())


def test_options_of_a_refiner_object_are_in_the_recipe_and_make_another_run(model, tmp_path):
    refiner = loaded_plugins().registry.get("refiner", "sparseswaps").load()
    asked = (model, "wanda", 0.5, None, batches())
    first = pruneforge.prune(*asked, refine=refiner(steps=1), output=tmp_path / "out")
    assert first.report["recipe"]["refine_options"]["steps"] == 1
    with pytest.raises(PruneForgeError, match="is another one: recipe refine_options steps was 1 and is 2 now"):
        pruneforge.prune(*asked, refine=refiner(steps=2), output=tmp_path / "out", resume=True)
    named = pruneforge.prune(*asked, refine="sparseswaps", refine_options={"steps": 1})
    assert all(torch.equal(named.masks[name], mask) for name, mask in first.masks.items())


def test_prune_and_estimate_take_one_metric(model):
    for function in (pruneforge.prune, pruneforge.estimate):
        with pytest.raises(PruneForgeError, match="several metrics are for prune_each"):
            function(model, ["magnitude", "random"])


class Selects(Refiner):
    """Selects again by the pattern it is given."""

    def refine(self, layer, stats, pruned, pattern):
        return Pruned(pattern.select(layer.weight.abs()))


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_refiner_keeps_what_a_threshold_gave_its_layer(scope, model):
    plain = pruneforge.prune(model, "magnitude", 0.371, options={"scope": scope})
    refined = pruneforge.prune(model, "magnitude", 0.371, options={"scope": scope}, refine=Selects())
    assert all(torch.equal(refined.masks[name], mask) for name, mask in plain.masks.items())


class Raises(Allocator):
    def allocate(self, measures, sizes, sparsity):
        raise ValueError("two\nlines")


class Nothing(Allocator):
    def allocate(self, measures, sizes, sparsity):
        return None


class Zeroes(Nothing):
    def measure(self, block, stats, score):
        block.layers[0].weight.mul_(0)
        return {}


class Tensors(Nothing):
    def measure(self, block, stats, score):
        return {"x": torch.ones(1)}


@pytest.mark.parametrize(
    ("allocator", "said"),
    [
        (Raises(), "allocator 'raises' failed to allocate: ValueError: two lines"),
        (Nothing(), "allocator 'nothing' returned NoneType; it must return a mapping"),
        (Zeroes(), "allocator 'zeroes' changed the weight of layer 'model.layers.0.self_attn.q_proj' in place"),
        (Tensors(), "allocator 'tensors' measured of block 'model.layers.0' what JSON cannot hold"),
    ],
)
def test_a_mistake_of_an_allocator_is_named(allocator, said):
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(tiny_llama(torch.float32), "magnitude", 0.5, allocator=allocator)


def test_a_layer_that_loses_everything_is_reported(model, tmp_path):
    (tmp_path / "shares.yaml").write_text(json.dumps({"*.0.mlp.up_proj": 1.0, "*": 0.3}))
    allocator = f"file:{tmp_path / 'shares.yaml'}"
    found = pruneforge.prune(model, "magnitude", 0.42, allocator=allocator, output=tmp_path / "out")
    assert not found.masks["model.layers.0.mlp.up_proj"].any()
    assert found.report["warnings"] == ["model.layers.0.mlp.up_proj: all of its weights are pruned"]
