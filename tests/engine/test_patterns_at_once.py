"""Several patterns in one pass over the calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import outcome, run_of, tiny_llama, tokens
from safetensors.torch import load_file, save_file

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.engine.budget import Budgets
from pruneforge.engine.chain import Chain
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.residency import InMemory
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.hookspecs import hookimpl
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress

PATTERNS = [0.3, 0.5, "2:4"]


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def alone(model: Path, metric: str, pattern: float | str, output: Path, **settings: object) -> Path:
    sparsity, text = (None, pattern) if isinstance(pattern, str) else (pattern, None)
    settings |= {"output": output, "propagate": "dense", "gradient_cache": output.with_suffix(".gradients")}
    pruneforge.prune(model, metric, sparsity, text, tokens().split(3), **settings)
    return output


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "sparsegpt", "gblm"])
def test_each_pattern_gets_what_a_run_of_its_own_gives(metric, model, tmp_path):
    found = pruneforge.prune_each(model, metric, PATTERNS, tokens().split(3), output=tmp_path / "all")
    assert list(found) == ["0.3", "0.5", "2of4"]
    for name, pattern in zip(found, PATTERNS, strict=True):
        expected = alone(model, metric, pattern, tmp_path / f"{name} alone")
        assert outcome(tmp_path / "all" / name) == outcome(expected)
        assert found[name].report["measured"]["patterns_at_once"] == 3


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_comparison_groups_of_every_size_go_together(scope, model, tmp_path):
    options = {"scope": scope}
    found = pruneforge.prune_each(
        model, "wanda", [0.3, 0.7], tokens().split(3), output=tmp_path / "all", options=options
    )
    for name in found:
        expected = alone(model, "wanda", float(name), tmp_path / f"{name} alone", options=options)
        assert outcome(tmp_path / "all" / name) == outcome(expected)


def test_every_batch_passes_every_block_once(model, tmp_path):
    found = pruneforge.prune_each(model, "wanda", [0.1, 0.2, 0.3, 0.4], tokens().split(2), output=tmp_path / "all")
    spans = found["0.1"].profile.spans
    assert sum(span.stage == "calibrate" for span in spans) == 3 * 3
    assert not any(span.stage == "propagate" for span in spans)


class Interrupted:
    """Stops when a block of one pattern was pruned."""

    def __init__(self, pattern: str, index: int) -> None:
        self.pattern, self.index = pattern, index

    @hookimpl
    def pruneforge_block_pruned(self, run, result):
        if str(run.pattern) == self.pattern and result.index == self.index:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("pattern", "index"), [("0.3", 0), ("0.5", 1), ("2:4", 2)])
def test_an_interrupted_run_goes_on_for_each_pattern_from_its_own_block(pattern, index, model, tmp_path):
    output = tmp_path / "all"
    observer = Interrupted(pattern, index)
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune_each(model, "sparsegpt", PATTERNS, tokens().split(3), output=output)
    finally:
        loaded_plugins().unregister(observer)
    pruneforge.prune_each(model, "sparsegpt", PATTERNS, tokens().split(3), output=output, resume=True)
    before = outcome(output / "0.5")
    for name, asked in zip(["0.3", "0.5", "2of4"], PATTERNS, strict=True):
        assert outcome(output / name) == outcome(alone(model, "sparsegpt", asked, tmp_path / f"{name} alone"))
    again = pruneforge.prune_each(model, "sparsegpt", PATTERNS, tokens().split(3), output=output, resume=True)
    assert outcome(output / "0.5") == before
    assert again["0.5"].report["sparsity"]["reached"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("patterns", "settings", "message"),
    [
        ([0.3, 0.5], {"propagate": "pruned"}, "add `propagate` dense"),
        ([0.5, 0.5], {}, "pattern 0.5 is asked for twice"),
        ([], {}, "no pattern is asked for"),
        ([0.5, "3:2"], {}, "pattern '3:2' keeps 3 of every 2"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(patterns, settings, message, model, tmp_path):
    with pytest.raises(PruneForgeError, match=message):
        pruneforge.prune_each(model, "wanda", patterns, tokens().split(3), output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_takes_one_pattern(tmp_path):
    with pytest.raises(PruneForgeError, match="more than one metric or pattern needs a model that is streamed"):
        pruneforge.prune_each(tiny_llama(), "magnitude", [0.3, 0.5], output=tmp_path / "out")


def test_a_failure_leaves_no_folder_of_any_pattern(model, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PruneForgeError, match=r"layers\.0\.mlp\.up_proj' has non-finite weights"):
        pruneforge.prune_each(model, "magnitude", PATTERNS, output=tmp_path / "all" / "of them")
    assert not (tmp_path / "all").exists()


def test_nothing_is_laid_out_before_every_folder_is_known_to_take_its_run(model, tmp_path, monkeypatch):
    output = tmp_path / "all"
    observer = Interrupted("0.5", 1)
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune_each(model, "magnitude", [0.5], output=output)
    finally:
        loaded_plugins().unregister(observer)
    before = (output / "0.5" / "journal.jsonl").read_bytes()

    def prepare(self: Rewrite) -> None:
        raise AssertionError("files were laid out")

    monkeypatch.setattr(Rewrite, "prepare", prepare)
    with pytest.raises(PruneForgeError, match=r"the unfinished run in .*0\.5' is another one: recipe metric was"):
        pruneforge.prune_each(model, "wanda", [0.3, 0.5], tokens().split(3), output=output, resume=True)
    assert (output / "0.5" / "journal.jsonl").read_bytes() == before
    assert not (output / "0.3").exists()


def test_the_dense_copy_that_several_patterns_need_counts_in_the_budget(monkeypatch):
    monkeypatch.setattr("pruneforge.engine.budget.resident_bytes", lambda: 0)  # it changes from one moment to the next
    adapter = loaded_plugins().registry.create("adapter", "llama")
    model = LoadedModel(tiny_llama(torch.float32), adapter, None, "tiny")
    blocks = adapter.blocks(model.module)
    metric = loaded_plugins().registry.create("metric", "wanda")
    budgets, cpu = Budgets(host=1 << 40), torch.device("cpu")
    run = run_of(metric, blocks)
    one, _ = budgets.for_activations([run], model, [], cpu)
    two, _ = budgets.for_activations([run, run], model, [], cpu)
    assert one - two == sum(layer.parameter.nbytes for layer in blocks[0].layers)


def test_a_name_that_prune_knows_and_prune_each_does_not_is_refused(model, tmp_path):
    with pytest.raises(PruneForgeError, match="takes its sparsities and patterns as `patterns`, not as sparsity="):
        pruneforge.prune_each(model, "magnitude", [0.5], output=tmp_path / "all", sparsity=0.3)


def test_runs_of_several_metrics_share_one_pass():
    metrics, masks = ("magnitude", "wanda", "sparsegpt", "gblm"), {}
    dense = tiny_llama()
    batches = tokens().split(3)
    adapter = loaded_plugins().registry.create("adapter", "llama")
    blocks = adapter.blocks(dense)
    runs = [run_of(loaded_plugins().registry.create("metric", name), blocks, propagate="dense") for name in metrics]

    def keep(run, result):
        masks.setdefault(run.metric.name, {}).update(result.masks)

    chain = Chain(dense, adapter, blocks, InMemory(dense, blocks, torch.device("cpu")))
    prune_blocks(runs, chain, {"": [adapter.batch(ids, dense) for ids in batches]}, Progress(), keep)
    for name in metrics:
        expected = pruneforge.prune(tiny_llama(), name, 0.5, None, batches, propagate="dense").masks
        assert masks[name].keys() == expected.keys()
        assert all(torch.equal(masks[name][layer], expected[layer]) for layer in expected), name


def test_each_metric_gets_what_a_run_of_its_own_gives(model, tmp_path):
    metrics = {"magnitude": "magnitude", "wanda": "wanda", "solver": "sparsegpt", "weak": "gblm", "strong": "gblm"}
    options = {"weak": {"alpha": 1.0}, "strong": {"alpha": 50.0, "norm": "l2"}}
    settings = {"gradient_cache": tmp_path / "gradients"}
    together = pruneforge.prune_each(
        model, metrics, [0.5, "2:4"], tokens().split(3), output=tmp_path / "all", options=options, **settings
    )
    assert list(together) == [f"{label}-{pattern}" for label in metrics for pattern in ("0.5", "2of4")]
    assert together["weak-0.5"].report["measured"]["patterns_at_once"] == 10
    for name in together:
        label, _, pattern = name.partition("-")
        asked = "2:4" if pattern == "2of4" else float(pattern)
        expected = alone(model, metrics[label], asked, tmp_path / name, options=options.get(label, {}))
        assert outcome(tmp_path / "all" / name) == outcome(expected), name
    spans = together["weak-0.5"].profile.spans
    assert sum(span.stage == "calibrate" for span in spans) == 3 * 2  # blocks and batches, once for all


def test_several_metrics_resume_together(model, tmp_path):
    observer = Interrupted("2:4", 1)
    plugins = loaded_plugins()
    plugins.register(observer)
    asked = (model, ["wanda", "sparsegpt"], ["2:4"], tokens().split(3))
    try:
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune_each(*asked, output=tmp_path / "all")
    finally:
        plugins.unregister(observer)
    resumed = pruneforge.prune_each(*asked, output=tmp_path / "all", resume=True)
    for name in resumed:
        expected = alone(model, name.partition("-")[0], "2:4", tmp_path / name)
        assert outcome(tmp_path / "all" / name) == outcome(expected)


@pytest.mark.parametrize(
    ("metrics", "options", "said"),
    [
        (["wanda", "wanda"], {}, "metric 'wanda' is asked for twice; give each a label"),
        ([], {}, "no metric is asked for"),
        ({"a/b": "wanda", "c": "gblm"}, {}, "cannot be part of a folder's name"),
        (["wanda", "gblm"], {"alpha": 1}, "unknown metric in options of several"),
        (["wanda", "gblm"], {"gblm": 1}, "options of 'gblm' must be a mapping"),
        (["wanda", "gblm"], {"wanda": {"alpha": 1}}, "unknown option of wanda 'alpha'"),
    ],
)
def test_metrics_that_cannot_go_together_are_named(metrics, options, said, model, tmp_path):
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune_each(model, metrics, [0.5], tokens().split(3), output=tmp_path / "all", options=options)
    assert not (tmp_path / "all").exists()
