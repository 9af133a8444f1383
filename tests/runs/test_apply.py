"""Masks that were published make the model again, byte for byte, or say why they do not."""

from __future__ import annotations

import json
import shutil

import commands
import pytest
import torch
import transformers
from conftest import interrupted_after, outcome, tiny_llama, tokens

import pruneforge
from pruneforge import PruneForgeError

OWN = {"pruneforge.json", "recipe.yaml"}


def saved(folder, dtype=torch.float32, **changes):
    tiny_llama(dtype, **changes).save_pretrained(folder, max_shard_size="100KB")
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in OWN}


def gpt2(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


class Alternating(pruneforge.Allocator):
    """Prunes one block by 3 of 4 and the next by 1 of 4."""

    def allocate(self, measures, sizes, sparsity):
        blocks = enumerate(sizes.values())
        return {layer: 0.25 if number % 2 else 0.75 for number, layers in blocks for layer in layers}


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"metric": "wanda", "sparsity": 0.5}),
        (torch.bfloat16, {"metric": "wanda", "pattern": "2:4"}),
        (torch.bfloat16, {"metric": "magnitude", "sparsity": 0.37, "options": {"scope": "model"}}),
        (torch.float16, {"metric": "wanda", "sparsity": 0.6, "allocator": "owl", "exclude": ["*.down_proj"]}),
        (torch.float32, {"metric": "ria", "pattern": "2:4", "options": {"permutation": "snake"}}),
        (
            torch.float32,
            {"metric": "ria", "pattern": "2:4", "options": {"permutation": "snake"}, "allocator": Alternating()},
        ),
    ],
)
def test_a_sharded_checkpoint_gets_the_bytes_that_prune_wrote(dtype, settings, tmp_path):
    model = saved(tmp_path / "model", dtype)
    pruned = pruneforge.prune(model, calibration=[tokens()], output=tmp_path / "pruned", **settings)
    applied = pruneforge.apply(tmp_path / "pruned", model, tmp_path / "applied")
    assert len(list(model.glob("*.safetensors"))) > 1
    assert files(tmp_path / "applied") == files(tmp_path / "pruned")
    assert applied.report["sparsity"] == pruned.report["sparsity"]
    assert applied.report["pattern"]["pattern"] == pruned.report["pattern"]["pattern"] or "pattern" not in settings
    assert applied.report["masks"]["recipe"] == pruned.report["recipe"]
    assert applied.report["updated"] == []
    again = pruneforge.apply(tmp_path / "applied", model, tmp_path / "again")
    assert again.report["masks"]["sha256"] == applied.report["masks"]["sha256"]
    assert again.report["masks"]["recipe"] == pruned.report["recipe"]


def test_transposed_weights_too(tmp_path):
    model = gpt2(tmp_path / "model")
    pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=tmp_path / "pruned")
    pruneforge.apply(tmp_path / "pruned", model, tmp_path / "applied")
    assert files(tmp_path / "applied") == files(tmp_path / "pruned")


def test_a_model_in_memory_too(tmp_path):
    pruned = pruneforge.prune(tiny_llama(), "wanda", 0.5, None, [tokens()], output=tmp_path / "pruned")
    model = tiny_llama()
    applied = pruneforge.apply(tmp_path / "pruned", model, tmp_path / "applied")
    assert applied.report["warnings"] == []
    assert files(tmp_path / "applied") == files(tmp_path / "pruned")
    for ours, theirs in zip(model.parameters(), pruned.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(PruneForgeError, match="is not the one that the masks were made for"):
        pruneforge.apply(tmp_path / "pruned", tiny_llama(seed=1))
    in_single = tiny_llama(torch.float32)
    assert "fingerprint is not checked" in pruneforge.apply(tmp_path / "pruned", in_single).report["warnings"][0]


def test_a_run_that_was_stopped_goes_on(tmp_path):
    model = saved(tmp_path / "model")
    pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned")
    pruneforge.apply(tmp_path / "pruned", model, tmp_path / "whole")
    with interrupted_after(1):
        pruneforge.apply(tmp_path / "pruned", model, tmp_path / "stopped")
    pruneforge.apply(tmp_path / "pruned", model, tmp_path / "stopped", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_another_model_is_refused_unless_any_is_asked_for(tmp_path):
    model, other = saved(tmp_path / "model"), saved(tmp_path / "other", seed=1)
    pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned")
    with pytest.raises(PruneForgeError, match=r"is not the one .*any_model"):
        pruneforge.apply(tmp_path / "pruned", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = pruneforge.apply(tmp_path / "pruned", other, tmp_path / "out", any_model=True)
    assert all(
        torch.equal(mask, pruneforge.load(tmp_path / "pruned").masks[name]) for name, mask in found.masks.items()
    )


@pytest.mark.parametrize(("method", "least"), [({"metric": "sparsegpt"}, 21), ({"recover": "reconstruct"}, 22)])
def test_updated_weights_are_named_and_not_passed_over(method, least, tmp_path):
    model = saved(tmp_path / "model")
    settings = {"metric": "magnitude", "sparsity": 0.5, "calibration": [tokens()], **method}
    with interrupted_after(0):
        pruneforge.prune(model, output=tmp_path / "pruned", **settings)
    report = pruneforge.prune(model, output=tmp_path / "pruned", resume=True, **settings).report
    assert len(report["updated"]) >= least
    with pytest.raises(PruneForgeError, match=rf"also changed weights that remain \({len(report['updated'])} tensors"):
        pruneforge.apply(tmp_path / "pruned", model, tmp_path / "out")
    found = pruneforge.apply(tmp_path / "pruned", model, tmp_path / "out", masks_only=True)
    assert f"also changed {len(report['updated'])} tensors" in found.report["warnings"][0]
    assert (tmp_path / "out" / "pruneforge.masks").read_bytes() == (
        tmp_path / "pruned" / "pruneforge.masks"
    ).read_bytes()
    dense, ours = tiny_llama(torch.float32), found.model
    for name, mask in found.masks.items():
        assert torch.equal(ours.get_submodule(name).weight, dense.get_submodule(name).weight.masked_fill(~mask, 0))


def test_masks_without_a_report_are_taken_with_a_warning(tmp_path):
    model = saved(tmp_path / "model")
    pruneforge.prune(model, "magnitude", 0.5, exclude=["*.down_proj"], output=tmp_path / "pruned")
    (tmp_path / "alone").mkdir()
    file = shutil.copy(tmp_path / "pruned" / "pruneforge.masks", tmp_path / "alone" / "some.safetensors")
    with pytest.raises(PruneForgeError, match=r"3 layers have no mask, such as '.*down_proj'; .*`exclude`"):
        pruneforge.apply(file, model, tmp_path / "out")
    found = pruneforge.apply(file, model, tmp_path / "out", exclude=["*.down_proj"])
    assert "it is not checked" in found.report["warnings"][0]
    assert found.report["masks"]["recipe"] is None
    assert files(tmp_path / "out") == files(tmp_path / "pruned")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, "7 of 21 masks are for layers that the model does not have"),
        ({"num_hidden_layers": 4}, "7 layers have no mask"),
        ({"intermediate_size": 128}, r"is \(128, 64\), and its mask \(160, 64\)"),
    ],
)
def test_layers_that_do_not_match_are_one_line(changes, said, tmp_path):
    pruneforge.prune(saved(tmp_path / "model"), "magnitude", 0.5, output=tmp_path / "pruned")
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.apply(tmp_path / "pruned", saved(tmp_path / "other", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    model = saved(tmp_path / "model")
    pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned")
    done = commands.run("apply", "pruned", "model", "--output", "out", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["masks"]["path"] == "pruned"
    assert files(tmp_path / "out") == files(tmp_path / "pruned")
    wrong = commands.run("apply", "nowhere", "model", "--output", "other", folder=tmp_path)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
