"""Recovery of a whole model: under masks that stay, in every way a run can go, stopped anywhere."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import commands
import experts
import pytest
import torch
from conftest import interrupted_after, outcome, tiny_llama, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pruneforge
from pruneforge import Objective, PruneForgeError, Recovery
from pruneforge.checkpoint.journal import Journal
from pruneforge.engine.model_recovery import PrunedModel
from pruneforge.runs.card import model_card

QUICK = {"steps": 6, "save_every": 2, "rank": 4, "lr": 3e-3, "vector_lr": 1e-2}
PERP = {"recover": "perp", "recover_options": QUICK}
KILLER = Path(__file__).parent / "killer.py"


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_llama(torch.float32, attention_bias=True).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def batches():
    return tokens().split(3)


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        name: value for file in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(file).items()
    }


def stopped_at(monkeypatch, step):
    """Interrupt training once it has taken so many steps."""
    taken = []
    real = PrunedModel.step

    def counted(self, optimizer):
        if len(taken) == step:
            raise KeyboardInterrupt
        taken.append(None)
        real(self, optimizer)

    monkeypatch.setattr(PrunedModel, "step", counted)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.6, None), (None, "2:4")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_zeros_and_excluded_layers_stay_in_memory_and_streamed(sparsity, pattern, dtype, model, tmp_path):
    asked = ("magnitude", sparsity, pattern, batches())
    settings = {"dtype": dtype, "exclude": ["*.0.*.down_proj"]}
    plain = pruneforge.prune(model, *asked, output=tmp_path / "plain", **settings)
    streamed = pruneforge.prune(model, *asked, output=tmp_path / "out", **settings, **PERP)
    whole = pruneforge.prune(model, *asked, **settings, **PERP)
    before, after, original = weights(plain.folder), weights(streamed.folder), weights(model)
    ours = dict(whole.model.named_parameters())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    for name, mask in plain.masks.items():
        assert torch.equal(streamed.masks[name], mask)
        zeros = after[f"{name}.weight"][~mask]
        assert torch.equal(zeros.view(torch.int32), torch.zeros_like(zeros, dtype=torch.int32))  # no -0 either
    assert torch.equal(after["model.layers.0.mlp.down_proj.weight"], original["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert {name for name in after if name.endswith("_proj.weight")} - changed == {
        "model.layers.0.mlp.down_proj.weight"
    }
    for name in changed:
        assert torch.equal(after[name], ours[name].float()), name


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_streamed_run_goes_on_from_its_last_state_to_the_same_bytes(stop, model, tmp_path, monkeypatch):
    asked = (model, "wanda", 0.6, None, batches())
    whole = pruneforge.prune(*asked, output=tmp_path / "whole", **PERP)
    with interrupted_after(1):
        pruneforge.prune(*asked, output=tmp_path / "out", **PERP)
    with monkeypatch.context() as patched:
        stopped_at(patched, stop)
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune(*asked, output=tmp_path / "out", resume=True, **PERP)
    assert (tmp_path / "out" / "recovery.state").is_file() == (stop >= 2)
    assert not (tmp_path / "out" / "pruneforge.json").exists()
    other = {"recover": "perp", "recover_options": {**QUICK, "steps": 7}}
    with pytest.raises(PruneForgeError, match="another one: recipe recover_options steps was 6 and is 7 now"):
        pruneforge.prune(*asked, output=tmp_path / "out", resume=True, **other)
    steps = []
    with monkeypatch.context() as patched:
        real = PrunedModel.step
        patched.setattr(PrunedModel, "step", lambda *given: (steps.append(None), real(*given)))
        pruneforge.prune(*asked, output=tmp_path / "out", resume=True, **PERP)
    assert len(steps) == QUICK["steps"] - stop // 2 * 2
    assert outcome(tmp_path / "out") == outcome(whole.folder)


def test_a_run_that_is_killed_while_it_recovers_resumes_to_the_same_bytes(checkpoint, tmp_path):
    asked = ["prune", checkpoint, "--metric", "magnitude", "--sparsity", "0.5", "--calibration", "python-docs"]
    asked += ["--samples", 4, "--seqlen", 32, "--recover", "perp", "--steps", 4, "--save-every", 1, "--rank", 2]
    asked += ["-p", KILLER, "--resume", "--output"]
    whole = commands.run(*asked, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    seen = set()
    for instant in (128, 16, 60):  # in a state, before the next one, and while the recovered files are written
        killed = commands.run(*asked, tmp_path / "out", KILL_AT=str(instant))
        assert killed.returncode == -signal.SIGKILL, (instant, killed.stderr)
        seen.add(frozenset(path.name for path in (tmp_path / "out").iterdir()))
    assert any("recovery.state" in names for names in seen)
    assert any(".recovered" in names for names in seen)
    done = commands.run(*asked, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


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
    carried = set(before) - {"measured", "warnings", "evaluation"}
    assert all(report[name] == before[name] for name in carried)
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


class InPlace(Recovery):
    def recover_model(self, site):
        with torch.no_grad():
            site.module.lm_head.weight.mul_(2)


class Dense(Recovery):
    def recover_model(self, site):
        for layer in site.layers:
            site.masks[layer.name].fill_(True)
        parameters = site.parameters()
        site.write({name: torch.ones_like(p) for name, p in parameters.items() if "q_proj" in name})


class Beyond(Recovery):
    def recover_model(self, site):
        site.write({"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 160)})


class Misshapen(Recovery):
    def recover_model(self, site):
        site.losses(next(site.batches()), {"model.norm.weight": torch.ones(3)})


class Exploding(Recovery):
    def recover_model(self, site):
        site.write({"model.norm.weight": torch.full((64,), torch.inf)})


class Diverging(Recovery):
    def recover_model(self, site):
        site.backward(site.losses(next(site.batches()), {"model.norm.weight": torch.full((64,), torch.nan)}).mean())


class Nothing(Recovery):
    pass


class Zero(Objective):
    def losses(self, output, batch):
        return 0 * output.logits.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recover": InPlace()}, "recovery 'inplace' changed 'lm_head.weight' in place; it must use `site.write`"),
        (
            {"recover": Dense()},
            "recovery 'dense' has weights of layer 'model.layers.0.self_attn.q_proj' where its mask",
        ),
        ({"recover": Beyond()}, "replaces 'model.layers.0.mlp.down_proj.weight', which is not one of `site.param"),
        ({"recover": Misshapen()}, "recovery 'misshapen' made 'model.norm.weight' of shape (3,) in place of (64,)"),
        ({"recover": Exploding()}, "recovery 'exploding' made 'model.norm.weight' too large for torch.float64"),
        ({"recover": Diverging()}, "recovery 'diverging' met a loss that is not finite"),
        ({"recover": Nothing()}, "recovery 'nothing' defines neither `recover_block` nor `recover_model`"),
        ({**PERP, "calibration": None}, "recovery 'perp' needs calibration data"),
    ],
)
def test_what_does_not_go_is_said_in_one_line(settings, said):
    model = tiny_llama()
    asked = {"calibration": batches(), "exclude": ["*.0.*.down_proj"], **settings}
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(model, "magnitude", 0.5, **asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_in_recovery_leaves_no_folder(model, tmp_path):
    with pytest.raises(PruneForgeError, match=r"made 'model\.norm\.weight' too large"):
        pruneforge.prune(model, "magnitude", 0.5, None, batches(), output=tmp_path / "out", recover=Exploding())
    assert not (tmp_path / "out").exists()
    pruned = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned").folder
    with pytest.raises(PruneForgeError, match=r"made 'model\.norm\.weight' too large"):
        pruneforge.recover(pruned, Exploding(), batches(), output=tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_the_loss_is_that_of_the_objective():
    plain, zero = tiny_llama(), tiny_llama()
    pruneforge.prune(plain, "magnitude", 0.5)
    pruneforge.prune(zero, "magnitude", 0.5, None, batches(), objective=Zero(), **PERP)
    for one, two in zip(plain.parameters(), zero.parameters(), strict=True):
        assert torch.equal(one, two)  # its gradients are zero


def test_runs_that_share_a_pass_recover_each_its_own(model, tmp_path):
    asked = {**PERP, "propagate": "dense"}
    together = pruneforge.prune_each(model, "wanda", [0.5, "2:4"], batches(), output=tmp_path / "all", **asked)
    alone = pruneforge.prune(model, "wanda", 0.5, None, batches(), output=tmp_path / "alone", **asked)
    assert outcome(together["0.5"].folder) == outcome(alone.folder)


def test_bad_folders_are_named(model, tmp_path):
    asked = {"recover_options": QUICK, "output": tmp_path / "out"}

    def refused(folder, said, recovery="perp", data=None, **changes):
        with pytest.raises(PruneForgeError) as error:
            pruneforge.recover(folder, recovery, data or batches(), **{**asked, **changes})
        assert said in str(error.value)
        assert not (tmp_path / "out").exists()

    refused(model, "holds no masks.safetensors; it is not the output of a pruning run")
    pruned = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "pruned").folder
    refused(pruned, "recovery 'ridge' needs the dense weights of each block", "ridge", recover_options={})
    report = json.loads((pruned / "pruneforge.json").read_text())
    (pruned / "pruneforge.json").unlink()
    refused(pruned, "holds no finished pruneforge.json")
    (pruned / "pruneforge.json").write_text(json.dumps(report))
    masks = (pruned / "masks.safetensors").read_bytes()
    (pruned / "masks.safetensors").write_bytes(masks[:-1] + bytes([~masks[-1] & 255]))
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


def test_several_processes_are_refused_before_anything_is_loaded(checkpoint, tmp_path):
    asked = ("prune", checkpoint, "--metric", "magnitude", "--calibration", "python-docs", "--recover", "perp")
    for done in commands.run_together(2, *asked, "--output", tmp_path / "out"):
        assert done.returncode == 2
        assert "recovery 'perp' trains the whole model, in one process; prune with several" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_trained_model_wins_back_much_of_what_pruning_lost(checkpoint):
    asked = (checkpoint, "magnitude", 0.6, None, "python-docs")
    data = {"samples": 48, "seqlen": 128}

    def perplexity(model):
        return pruneforge.evaluate(model, "perplexity", data="python-docs", window=128, limit=30)["perplexity"]

    options = {"steps": 12, "accumulate": 1, "lr": 1e-3, "vector_lr": 1e-2, "rank": 4}
    dense, plain = perplexity(checkpoint), perplexity(pruneforge.prune(*asked, **data))
    recovered = perplexity(pruneforge.prune(*asked, **data, recover="perp", recover_options=options))
    assert plain - recovered > 0.3 * (plain - dense)
