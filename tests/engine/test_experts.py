"""A mixture's experts: slices of one parameter that receive the tokens routed to them, maybe none."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import experts
import pytest
import reference
import torch
from conftest import tokens
from experts import EXPERTS, MISSED, tiny
from test_processes import free_port

import pruneforge
from pruneforge import ColumnSquares, GradientMagnitude, Metric, Pruned, PruneForgeError
from pruneforge.checkpoint.reader import Checkpoint

KINDS = ("gate_up_proj", "down_proj")
UNREACHED = [f"model.layers.1.mlp.experts.{kind}.{MISSED}" for kind in KINDS]


@pytest.fixture(autouse=True)
def adapter():
    with experts.registered():
        yield


def kept_statistics(kind) -> tuple[Metric, dict]:
    """A metric that keeps a statistic of each layer, with its counts."""
    found = {}

    class Kept(Metric):
        requires = (kind,)

        def score(self, layer, stats):
            found[layer.name] = (stats[kind].total.clone(), stats[kind].samples, stats[kind].tokens)
            return layer.weight.abs()

    return Kept(), found


def expert_inputs(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each expert's weights receive in the dense model [tokens, in], computed expert by expert."""
    inputs = {}

    def look(name):
        def hook(module, args):
            hidden, chosen, _ = args
            for number in range(EXPERTS):
                x = hidden[(chosen == number).any(1)]
                gate, up = (x @ module.gate_up_proj[number].T).chunk(2, dim=-1)
                inputs[f"{name}.gate_up_proj.{number}"] = x
                inputs[f"{name}.down_proj.{number}"] = torch.nn.functional.silu(gate) * up

        return hook

    modules = [(f"model.layers.{i}.mlp.experts", block.mlp.experts) for i, block in enumerate(model.model.layers)]
    handles = [module.register_forward_pre_hook(look(name)) for name, module in modules]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("size", [1, 2, 6])
def test_column_squares_are_those_of_each_experts_own_function(size):
    model = tiny()
    expected = expert_inputs(model, tokens())
    metric, found = kept_statistics(ColumnSquares)
    pruneforge.prune(model, metric, 0.5, None, tokens().split(size), propagate="dense")
    assert sum(len(x) for name, x in expected.items() if "0.mlp.experts.down" in name) == 2 * tokens().numel()
    for name, x in expected.items():
        if name not in UNREACHED:
            total, samples, count = found[name]
            torch.testing.assert_close(total, x.square().sum(0), rtol=1e-9, atol=1e-12, msg=name)
            assert (samples, count) == (6, len(x))


def test_wandas_masks_are_each_slices_own_and_nothing_else_changes():
    model = tiny()
    dense = copy.deepcopy(model)
    result = pruneforge.prune(model, "wanda", 0.5, None, tokens().split(2), propagate="dense")
    for name, x in expert_inputs(dense, tokens()).items():
        holder, _, number = name.rpartition(".")
        before, after = (each.get_parameter(holder)[int(number)] for each in (dense, model))
        mask = torch.ones_like(before, dtype=torch.bool)
        if name not in UNREACHED:
            scores = before.abs() * (x.square().sum(0) / 6).sqrt()
            mask = reference.mask_by_sorting(scores, 0.5, None, "row")
        assert torch.equal(result.masks[name], mask), name
        assert torch.equal(after, torch.where(mask, before, 0)), name
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(ours.mlp.gate.weight, theirs.mlp.gate.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pattern": "2:4"},
        *({"allocator": name} for name in ("owl", "erk", "lsa", "dlp")),
        {"refine": ["sparseswaps"]},
    ],
)
def test_an_expert_that_no_token_reached_stays_dense_and_the_report_names_it(settings):
    settings = {"sparsity": None if "pattern" in settings else 0.5, **settings}
    report = pruneforge.prune(tiny(), "wanda", calibration=tokens().split(2), **settings).report
    (warning,) = (line for line in report["warnings"] if "no calibration token" in line)
    assert warning == "no calibration token reached 2 layers, which stay dense: " + ", ".join(UNREACHED)
    layers = report["layers"]
    assert [name for name, layer in layers.items() if not layer["pruned"]] == UNREACHED
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    assert report["sparsity"]["weights"] == weights
    assert report["sparsity"]["pruned"] == sum(layer["pruned"] for layer in layers.values()) < weights / 2


@pytest.mark.parametrize("metric", ["wanda", "sparsegpt", "gblm"])
def test_every_metric_leaves_it_dense(metric):
    result = pruneforge.prune(tiny(), metric, 0.5, None, tokens().split(1))
    assert [name for name, mask in result.masks.items() if mask.all()] == UNREACHED


class Together(Metric):
    """Decides over whole blocks, each layer by Wanda's score, and keeps the names of what it was given."""

    requires = (ColumnSquares,)

    def __init__(self):
        super().__init__()
        self.given = set()

    def prune_block(self, layers, stats, patterns):
        self.given |= {layer.name for layer in layers} | stats.keys() | patterns.keys()
        scores = {la.name: la.weight.abs() * stats[la.name][ColumnSquares].per_sample().sqrt() for la in layers}
        return {name: Pruned(patterns[name].select(score)) for name, score in scores.items()}


def test_a_metric_that_decides_over_blocks_is_not_given_it():
    metric = Together()
    found = pruneforge.prune(tiny(), metric, 0.5, None, tokens().split(2))
    assert metric.given == found.masks.keys() - set(UNREACHED)
    assert all(found.masks[name].all() for name in UNREACHED)


def test_a_metric_that_needs_no_data_prunes_it():
    result = pruneforge.prune(tiny(), "magnitude", 0.5)
    assert result.report["sparsity"]["reached"] == 0.5
    assert result.report["warnings"] == []


@pytest.mark.parametrize("scope", ["block", "model"])
def test_wider_scopes_prune_their_share_of_what_was_reached(scope):
    metrics = {"options": {"scope": scope}, "propagate": "dense"}
    result = pruneforge.prune(tiny(), "wanda", 0.5, None, tokens().split(2), **metrics)
    reached = {name: mask for name, mask in result.masks.items() if name not in UNREACHED}
    assert all(result.masks[name].all() for name in UNREACHED)
    groups = [["layers.0."], ["layers.1."]] if scope == "block" else [["layers."]]
    for group in groups:
        masks = [mask for name, mask in reached.items() if any(part in name for part in group)]
        assert sum(int((~mask).sum()) for mask in masks) == sum(mask.numel() for mask in masks) // 2


def test_runs_of_one_pass_decide_each_for_itself(tmp_path):
    """Magnitude needs no token, though Wanda's statistics are collected beside it."""
    tiny().save_pretrained(tmp_path / "model", save_original_format=False)
    batches, settings = tokens().split(2), {"patterns": [0.5], "propagate": "dense"}
    results = pruneforge.prune_each(
        tmp_path / "model", ["magnitude", "wanda"], calibration=batches, output=tmp_path / "out", **settings
    )
    dense = [[name for name, mask in result.masks.items() if mask.all()] for result in results.values()]
    assert dense == [[], UNREACHED]


def test_each_samples_gradients_are_plain_autograds():
    model = tiny()
    expected: dict[str, torch.Tensor] = {}
    for row in tokens():
        model.zero_grad()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for name, weights in model.named_parameters():
            if "experts" in name:
                for number, gradient in enumerate(weights.grad):
                    slot = f"{name}.{number}"
                    expected[slot] = expected.get(slot, 0) + gradient.abs()
    model.zero_grad()
    metric, found = kept_statistics(GradientMagnitude)
    pruneforge.prune(model, metric, 0.5, None, tokens().split(1))
    for name, total in expected.items():
        if name not in UNREACHED:
            torch.testing.assert_close(found[name][0], total, rtol=1e-5, atol=1e-8)  # the model's loss is float32
            assert found[name][1] == 6
    assert not found.keys() & set(UNREACHED)


@pytest.mark.parametrize(
    ("metric", "batches", "said"),
    [
        ("gblm", tokens().split(2), r"0\.mlp\.experts\.gate_up_proj\.0.*batch's 2 samples.*`batch_size` 1"),
        (
            "wanda",
            [{"input_ids": tokens(2), "attention_mask": torch.ones(2, 24).long().tril(10)}],
            r"experts.*routed to it, so padding cannot be left out; calibrate with batches of equal lengths",
        ),
    ],
)
def test_what_routing_makes_impossible_is_refused(metric, batches, said):
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(tiny(), metric, 0.5, None, batches)


def test_a_kernel_for_all_experts_is_refused():
    model = tiny()
    model.set_experts_implementation("batched_mm")
    with pytest.raises(PruneForgeError, match=r"reached any routed layer of block 'model.layers.0'.*one expert's"):
        pruneforge.prune(model, "wanda", 0.5, None, [tokens()])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("metric", ["wanda", "sparsegpt"])
def test_slices_of_one_tensor_stream(metric, dtype, tmp_path):
    tiny(torch.float32).save_pretrained(tmp_path / "model", save_original_format=False)
    settings = {"dtype": dtype, "exclude": ["*experts.down_proj.1"]}
    expected = pruneforge.prune(tmp_path / "model", metric, 0.5, None, tokens().split(2), **settings)
    result = pruneforge.prune(
        tmp_path / "model", metric, 0.5, None, tokens().split(2), output=tmp_path / "out", **settings
    )
    assert result.report["warnings"] == expected.report["warnings"]
    assert "no calibration token" in result.report["warnings"][0]  # and nothing of loading it whole
    masks = pruneforge.load(tmp_path / "out").masks
    assert list(masks) == list(expected.masks)
    source, out = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "out")
    for name, mask in masks.items():
        assert torch.equal(mask, expected.masks[name]), name
        holder, _, number = name.rpartition(".")
        if "experts" not in name:
            continue
        before, after = (folder.read(folder.tensors[holder])[int(number)] for folder in (source, out))
        if metric == "wanda" or name in UNREACHED:
            assert torch.equal(after, torch.where(mask, before, 0)), name
        else:
            weights = expected.model.get_parameter(holder)[int(number)]
            assert torch.equal(after, weights.float()), name
    excluded = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(out.read(out.tensors[excluded])[1], source.read(source.tensors[excluded])[1])


def test_experts_that_a_checkpoint_stores_apart_are_loaded_whole_with_a_note(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    result = pruneforge.prune(tmp_path / "model", "wanda", 0.5, None, [tokens()], output=tmp_path / "out")
    assert "the checkpoint has no tensor 'model.layers.0.mlp." in result.report["warnings"][0]
    assert "so the model was loaded whole" in result.report["warnings"][0]
    expected = pruneforge.prune(tiny(), "wanda", 0.5, None, [tokens()])
    for ours, theirs in zip(result.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


RUN = """
import json, sys
import experts, pruneforge, torch
from conftest import tokens
masks = {}
with experts.registered():
    model = experts.tiny()
    result = pruneforge.prune(model, "wanda", 0.5, None, [part[:, :2] for part in tokens().split(1)])
flat = {name: int("".join(map(str, mask.int().flatten().tolist())), 2) for name, mask in result.masks.items()}
weights = float(sum(p.double().abs().sum() for p in model.parameters()))
print(json.dumps([flat, weights, result.report.get("warnings")]))
"""


def test_processes_that_reach_other_experts_agree():
    def run(world: int) -> list:
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared = shared if world > 1 else {}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RUN],
                env={**os.environ, **shared, **({"RANK": str(rank)} if shared else {})},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        return [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks]

    (alone,), (first, second) = run(1), run(2)
    assert first[:2] == second[:2] == alone[:2]
    assert first[2] == alone[2]
