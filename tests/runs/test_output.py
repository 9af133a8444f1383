"""What a run writes, and that it writes all of it or nothing."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import tiny_llama, tokens
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.interfaces.hookspecs import hookimpl
from pruneforge.plugins import loaded_plugins


def run(model, output, **changes):
    settings = {"samples": 4, "seqlen": 64, "output": output, **changes}
    return pruneforge.prune(model, "wanda", 0.5, "2:4", "python-docs", **settings)


def test_the_folder_holds_model_tokenizer_masks_report_and_recipe(checkpoint, tmp_path):
    output = tmp_path / "deep" / "out"
    result = run(checkpoint, output)
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pruneforge.json",
        "pruneforge.masks",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(tmp_path.joinpath("deep").iterdir()) == [output]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert next(model.parameters()).dtype == torch.bfloat16
    for name, mask in result.masks.items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()
    text = "a function returns"
    original = AutoTokenizer.from_pretrained(checkpoint)
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == original(text).input_ids
    config = json.loads((output / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config", "compression_config"} & set(config)


def test_masks_are_packed_bits_and_come_back(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path / "out")
    loaded = pruneforge.load(tmp_path / "out")
    assert loaded.report == result.report
    assert list(loaded.masks) == list(result.masks)
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in result.masks.items())
    with safe_open(tmp_path / "out" / "pruneforge.masks", "pt") as file:
        for name, mask in result.masks.items():
            assert file.get_tensor(name).numel() == (mask.numel() + 7) // 8


def test_only_weights_are_named_as_weights_and_the_former_name_of_masks_is_read(checkpoint, tmp_path):
    out = tmp_path / "out"
    masks = run(checkpoint, out).masks
    weights = {path.name for path in out.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
    assert weights == {"model.safetensors"}, "engines load all of them where there is no index"
    (out / "pruneforge.masks").rename(out / "masks.safetensors")
    found = pruneforge.load(out).masks
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_masks_are_not_inferred_from_zeros(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    kept = torch.zeros(352, 128, dtype=torch.bfloat16)
    model.model.layers[0].mlp.gate_proj.weight.data = kept
    result = pruneforge.prune(model, "magnitude", 0.25, output=tmp_path / "out")
    mask = pruneforge.load(tmp_path / "out").masks["model.layers.0.mlp.gate_proj"]
    assert (~mask).sum() == 352 * 128 // 4
    assert result.report["layers"]["model.layers.0.mlp.gate_proj"]["sparsity"] == 0.25


def test_the_report_says_what_was_asked_and_what_came_out(checkpoint, tmp_path):
    report = run(checkpoint, tmp_path / "out").report
    assert report["recipe"]["metric"] == "wanda"
    assert report["pattern"] == {"pattern": "2:4", "scope": None}
    assert report["sparsity"]["reached"] == 0.5
    assert report["calibration"]["samples"] == 4
    assert report["calibration"]["tokens"] == 256
    assert report["calibration"]["source"] == "python-docs"
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["measured"]["peak_memory"]["host_bytes"] > 0
    assert len(report["layers"]) == 35


def test_two_reports_of_one_recipe_differ_only_in_what_was_measured(checkpoint, tmp_path):
    reports = []
    for name in ("first", "second"):
        run(checkpoint, tmp_path / name)
        report = json.loads((tmp_path / name / "pruneforge.json").read_text())
        assert list(report)[-1] == "measured"
        del report["measured"]
        reports.append(json.dumps(report))
    assert reports[0] == reports[1]


def test_the_recipe_repeats_the_run(checkpoint, tmp_path):
    first = run(checkpoint, tmp_path / "out", seed=3)
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["seed"] == 3
    recipe.pop("plugins", None)
    again = pruneforge.prune(**recipe)
    assert all(torch.equal(again.masks[name], mask) for name, mask in first.masks.items())


class _Fails:
    """Raises in the middle of a run."""

    def __init__(self, error):
        self.error = error

    @hookimpl
    def pruneforge_block_pruned(self, result):
        if result.index == 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA out of memory")])
def test_a_run_that_fails_can_go_on(checkpoint, tmp_path, error):
    observer = _Fails(error)
    loaded_plugins().register(observer)
    try:
        with pytest.raises(type(error)):
            run(checkpoint, tmp_path / "out")
    finally:
        loaded_plugins().unregister(observer)
    with pytest.raises(PruneForgeError, match="holds an unfinished run"):
        run(checkpoint, tmp_path / "out")
    result, whole = run(checkpoint, tmp_path / "out", resume=True), run(checkpoint, tmp_path / "whole")
    assert all(torch.equal(result.masks[name], mask) for name, mask in whole.masks.items())


def test_a_write_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    from pruneforge.runs import in_memory

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(in_memory, "save_masks", fail)
    with pytest.raises(PruneForgeError, match=r"cannot be written.*No space left"):
        pruneforge.prune(tiny_llama(), "magnitude", 0.5, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_taken_is_refused_before_any_work(checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(PruneForgeError, match=r"full' is not empty"):
        run("no-such-model", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(PruneForgeError, match="is a file"):
        run(checkpoint, tmp_path / "full" / "thesis.txt")
    with pytest.raises(PruneForgeError, match="is not a folder that can be written to"):
        run(checkpoint, tmp_path / "full" / "thesis.txt" / "out")
    (tmp_path / "empty").mkdir()
    run(checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "pruneforge.json").is_file()


def test_an_empty_current_folder_and_a_link_to_one_are_filled(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    run(checkpoint, ".")
    assert pruneforge.load(tmp_path / "link").report["sparsity"]["reached"] == 0.5
    assert not [path for path in (tmp_path / "here").iterdir() if path.name.startswith(".")]


def test_damaged_and_foreign_folders_are_named(checkpoint, tmp_path):
    with pytest.raises(PruneForgeError, match=r"holds no pruneforge\.masks"):
        pruneforge.load(checkpoint)
    output = tmp_path / "out"
    run(checkpoint, output)
    (output / "pruneforge.masks").write_bytes(b"\x00" * 20)
    with pytest.raises(PruneForgeError, match="is damaged"):
        pruneforge.load(output)
    run(checkpoint, tmp_path / "other")
    report = json.loads((tmp_path / "other" / "pruneforge.json").read_text())
    (tmp_path / "other" / "pruneforge.json").write_text(json.dumps(report | {"format": 99}))
    with pytest.raises(PruneForgeError, match="another version"):
        pruneforge.load(tmp_path / "other")


def test_a_model_in_memory_is_pruned_in_place_and_saved_without_a_tokenizer(tmp_path):
    model = tiny_llama(torch.float32)
    result = pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=tmp_path / "out")
    assert result.model is model
    assert result.report["calibration"]["source"] == "batches from Python"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens(1)).logits, model(tokens(1)).logits)
