"""Recovery of a whole model that was pruned before: from Python and from the command line, stopped anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import experts
import pytest
import torch
from conftest import outcome, tokens
from safetensors.torch import load_file, save_file
from training import PERP, QUICK, batches, saved, stopped_at, weights
from transformers import AutoModelForCausalLM

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.checkpoint.journal import Journal
from pruneforge.runs.card import model_card


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "model")


def test_what_was_pruned_before_is_recovered_as_in_one_run(model, tmp_path):
    asked = (model, "magnitude", 0.6, None, batches())
    together = pruneforge.prune(*asked, output=tmp_path / "together", **PERP)
    pruned = pruneforge.prune(*asked, output=tmp_path / "pruned")
    found = pruneforge.recover(
        pruned.folder, "perp", batches(), output=tmp_path / "after", recover_options=QUICK, seed=0
    )
    one, two = outcome(together.folder), outcome(found.folder)
    for name in one:
        if name not in ("pruneforge.json", "recipe.yaml"):
            assert two[name] == one[name], name
    before, report = pruned.report, found.report
    carried = set(before) - {"measured", "warnings", "evaluation", "updated"}
    assert all(report[name] == before[name] for name in carried)
    assert report["updated"] == together.report["updated"] != []
    with pytest.raises(PruneForgeError, match="also changed weights that remain"):
        pruneforge.apply(found.folder, model, tmp_path / "applied")
    assert (found.folder / "recipe.yaml").read_bytes() == (pruned.folder / "recipe.yaml").read_bytes()
    (entry,) = report["recovered"]
    assert {name: entry[name] for name in ("name", "steps", "trained", "subsets")} == {
        name: together.report["recovery"][name] for name in ("name", "steps", "trained", "subsets")
    }
    assert entry["recipe"]["recover_options"] == QUICK
    assert "| recovered by | `perp` (" in model_card(report, "tiny")
    again = pruneforge.recover(found.folder, "perp", batches(), output=tmp_path / "twice", recover_options=QUICK)
    assert len(again.report["recovered"]) == 2
    assert all(torch.equal(again.masks[name], mask) for name, mask in pruned.masks.items())


def test_an_interrupted_recovery_of_a_folder_goes_on_wherever_it_stopped(model, tmp_path, monkeypatch):
    pruned = pruneforge.prune(model, "magnitude", 0.6, output=tmp_path / "pruned").folder
    output = tmp_path / "out"

    def recover(folder=output, **changes):
        options = {**QUICK, **changes.pop("recover_options", {})}
        return pruneforge.recover(pruned, "perp", batches(), output=folder, recover_options=options, **changes)

    whole = recover(tmp_path / "whole")
    with monkeypatch.context() as patched:
        stopped_at(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            recover()
    assert not output.exists()  # there is nothing to go on from
    for stop in (3, 2):
        with monkeypatch.context() as patched:
            stopped_at(patched, stop)
            with pytest.raises(KeyboardInterrupt):
                recover(resume=True)
    for changes, said in (
        ({}, "holds an unfinished run; go on with `resume`"),
        ({"resume": True, "recover_options": {"rank": 5}}, "recipe recover_options rank was 4 and is 5 now"),
        ({"resume": True, "seed": 1}, "recipe seed was 0 and is 1 now"),
    ):
        with pytest.raises(PruneForgeError) as error:
            recover(**changes)
        assert said in str(error.value)
    with monkeypatch.context() as patched:
        real = Path.replace
        moves = []

        def failing(self, target):
            if self.parent.name == ".recovered":
                if len(moves) == 3:
                    raise KeyboardInterrupt
                moves.append(target)
            return real(self, target)

        patched.setattr(Path, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            recover(resume=True)
    assert not (output / "config.json").exists()
    done = recover(resume=True)
    assert outcome(output) == outcome(whole.folder)
    assert recover(resume=True).report == done.report
    with pytest.raises(PruneForgeError, match=r"is another one: recipe seed was 0 and is 1 now; name another folder"):
        recover(resume=True, seed=1)


def test_masks_are_read_and_not_inferred_from_zeros(model, tmp_path):
    file = sorted(model.glob("*00003*"))[0]
    dense = load_file(file)
    name = next(name for name, value in dense.items() if name.endswith("_proj.weight"))
    dense[name][0] = 0  # zeros of the dense model
    save_file(dense, file, {"format": "pt"})
    pruned = pruneforge.prune(model, "magnitude", 0.3, output=tmp_path / "pruned", options={"scope": "row"})
    kept = pruned.masks[name.removesuffix(".weight")][0]
    assert kept.any()
    found = pruneforge.recover(pruned.folder, "perp", batches(), output=tmp_path / "out", recover_options=QUICK)
    row = weights(found.folder)[name][0]
    assert row[kept].all()
    assert not row[~kept].any()


@pytest.mark.parametrize("streams", [True, False])
def test_slices_of_a_parameter_recover_whether_the_adapter_streams_or_not(streams, tmp_path, monkeypatch):
    with experts.registered():
        tiny = experts.tiny().float()
        tiny.save_pretrained(tmp_path / "model")
        data = tokens(vocabulary=tiny.config.vocab_size).split(3)
        asked = {"output": tmp_path / "pruned", "exclude": ["*.experts.*.3"]}
        pruned = pruneforge.prune(tmp_path / "model", "magnitude", 0.5, **asked)
        if not streams:
            monkeypatch.setattr(experts.Mixtral, "skeleton", lambda *given: None)
        found = pruneforge.recover(tmp_path / "pruned", "perp", data, output=tmp_path / "out", recover_options=QUICK)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folders = (tmp_path / "model", tmp_path / "pruned", tmp_path / "out")
    dense, before, after = (AutoModelForCausalLM.from_pretrained(each).get_parameter(name) for each in folders)
    assert torch.equal(after[3], dense[3])  # which the user left dense
    assert not torch.equal(after[0], before[0])
    for number in range(3):
        mask = pruned.masks[f"{name}.{number}"]
        assert torch.equal(found.masks[f"{name}.{number}"], mask)
        assert not after[number].masked_fill(mask, 0).any()


def test_bad_folders_are_named(model, tmp_path):
    asked = {"recover_options": QUICK, "output": tmp_path / "out"}

    def refused(folder, said, recovery="perp", data=None, **changes):
        with pytest.raises(PruneForgeError) as error:
            pruneforge.recover(folder, recovery, data or batches(), **{**asked, **changes})
        assert said in str(error.value)
        assert not (tmp_path / "out").exists()

    refused(model, "holds no pruneforge.masks; it is not the output of a pruning run")
    pruned = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned").folder
    refused(pruned, "recovery 'ridge' needs the dense weights of each block", "ridge", recover_options={})
    report = json.loads((pruned / "pruneforge.json").read_text())
    (pruned / "pruneforge.json").unlink()
    refused(pruned, "holds no finished pruneforge.json")
    (pruned / "pruneforge.json").write_text(json.dumps(report))
    masks = (pruned / "pruneforge.masks").read_bytes()
    (pruned / "pruneforge.masks").write_bytes(masks[:-1] + bytes([~masks[-1] & 255]))
    refused(pruned, "the model has weights of layer 'model.layers.2.mlp.down_proj' where its mask prunes")


def test_the_journal_is_held_while_a_folder_recovers(model, tmp_path):
    pruned = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned").folder
    other = Journal(tmp_path / "out", {}, False)
    with pytest.raises(PruneForgeError, match="another process is writing"):
        pruneforge.recover(pruned, "perp", batches(), output=tmp_path / "out", resume=True)
    other.close()


def test_the_command_recovers_and_repeats_itself(checkpoint, tmp_path):
    data = ("--calibration", "python-docs", "--samples", 4, "--seqlen", 32)
    pruned = commands.invoke(
        "prune", checkpoint, "--metric", "magnitude", "--sparsity", "0.6", "--output", tmp_path / "p"
    )
    assert pruned.exit_code == 0, pruned.output
    asked = ("recover", tmp_path / "p", "--with", "perp", *data, "--steps", 2)
    asked += ("--train", "norms", "--recover-option", "vector_lr=0.01")
    done = commands.invoke(*asked, "--output", tmp_path / "a")
    assert done.exit_code == 0, done.output
    entry = json.loads((tmp_path / "a" / "pruneforge.json").read_text())["recovered"][0]
    count = entry["trained"]["parameters"]
    assert f"perp trained {count:,} parameters" in done.output
    assert entry["subsets"] == {"norms": count}
    again = commands.invoke(*asked, "--output", tmp_path / "b", "--json")
    assert json.loads(again.output)["recovered"][0]["identity"] == entry["identity"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    wrong = commands.invoke("recover", tmp_path / "p", "--with", "ridge", *data, "--output", tmp_path / "c")
    assert wrong.exit_code == 2
    assert "needs the dense weights of each block" in wrong.output
    assert not (tmp_path / "c").exists()
