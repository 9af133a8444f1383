"""Recovery of a whole model: under masks that stay, in every way a run can go, stopped anywhere."""

from __future__ import annotations

import signal
from pathlib import Path

import commands
import pytest
import torch
from conftest import interrupted_after, outcome, tiny_llama
from training import PERP, QUICK, batches, saved, stopped_at, weights

import pruneforge
from pruneforge import Objective, PruneForgeError, Recovery
from pruneforge.engine.model_recovery import PrunedModel

KILLER = Path(__file__).parent / "killer.py"


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "model")


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


class Renaming(Recovery):
    def recover_model(self, site):
        site.report(name="another")


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
        ({"recover": Renaming()}, "recovery 'renaming' reports 'name', which every recovery's entry has"),
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


def test_masks_that_a_recovery_changes_are_its_own():
    model = tiny_llama()
    result = pruneforge.prune(model, "magnitude", 0.5, None, batches(), recover=Dense())
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_parameter(f"{name}.weight"), result.masks[name].to(torch.float64))


class Selective(Recovery):
    """Fails for a model with few weights left; looks at the folder meanwhile."""

    folder: Path

    def recover_model(self, site):
        kept = sum(int(mask.count_nonzero()) for mask in site.masks.values())
        few = kept < 0.3 * sum(mask.numel() for mask in site.masks.values())
        mine = self.folder / ("0.8" if few else "0.5")
        assert not (mine / "config.json").exists(), "libraries would take it for a model"
        if few:
            raise ValueError("too few weights")


def test_a_recovery_that_fails_leaves_the_pruned_model_and_other_runs_alone(model, tmp_path):
    recovery, out = Selective(), tmp_path / "out"
    recovery.folder = out
    asked = {"calibration": batches(), "propagate": "dense"}
    with pytest.raises(PruneForgeError, match=r"too few weights; '.*0\.8' holds the model as it was pruned, which"):
        pruneforge.prune_each(model, "magnitude", [0.5, 0.8], output=out, recover=recovery, **asked)
    for sparsity in (0.5, 0.8):
        pruned = pruneforge.prune(model, "magnitude", sparsity, output=tmp_path / str(sparsity), **asked)
        one, two = outcome(pruned.folder), outcome(out / str(sparsity))
        assert {name for name in one if one[name] != two[name]} <= {"pruneforge.json", "recipe.yaml", "README.md"}
        assert set(one) == set(two)
    report = pruneforge.load(out / "0.8").report
    assert "too few weights" in report["recovery"]["failed"]
    assert any("the model is pruned alone" in text for text in report["warnings"])
    with pytest.raises(PruneForgeError, match=r"the finished run in .* is another one: failed was"):
        pruneforge.prune(model, "magnitude", 0.8, output=out / "0.8", recover=recovery, resume=True, **asked)
    found = pruneforge.recover(out / "0.8", "perp", batches(), output=tmp_path / "after", recover_options=QUICK)
    assert found.report["recovered"][0]["steps"] == QUICK["steps"]


class Telling(Recovery):
    """Says something, and is interrupted once."""

    stop = True

    def recover_model(self, site):
        if site.restored() is None:
            site.report(first=1)
            site.warn("it began")
            site.checkpoint({})
        if self.stop:
            raise KeyboardInterrupt


def test_what_a_recovery_said_before_it_was_interrupted_is_kept(model, tmp_path):
    recovery = Telling()
    asked = {"output": tmp_path / "out", "recover": recovery, "calibration": batches(), "resume": True}
    with pytest.raises(KeyboardInterrupt):
        pruneforge.prune(model, "magnitude", 0.5, **asked)
    recovery.stop = False
    report = pruneforge.prune(model, "magnitude", 0.5, **asked).report
    assert report["recovery"]["first"] == 1
    assert "it began" in report["warnings"]


def test_an_error_in_recovering_a_folder_leaves_none(model, tmp_path):
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


def test_several_processes_are_refused_before_anything_is_loaded(checkpoint, tmp_path):
    asked = ("prune", checkpoint, "--metric", "magnitude", "--calibration", "python-docs", "--recover", "perp")
    for done in commands.run_together(2, *asked, "--output", tmp_path / "out"):
        assert done.returncode == 2
        assert "recovery 'perp' trains the whole model, in one process; prune with several" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recover", "options", "share"),
    [
        ("perp", {"train": ["norms"]}, 0.2),
        ("perp", {"train": ["biases", "norms"]}, 0.4),
        ("perp", {"train": ["biases", "norms", "masklora"]}, 0.6),
        ("reconstruct", {}, 0.35),
    ],
)
def test_recoveries_win_back_what_the_papers_say_of_what_magnitude_lost(recover, options, share, checkpoint):
    asked = (checkpoint, "magnitude", 0.6, None, "python-docs")
    # With fewer samples it learns them by heart, and another Python brings another text.
    data = {"samples": 96, "seqlen": 128}

    def perplexity(model):
        return pruneforge.evaluate(model, "perplexity", data="python-docs", window=128, limit=30)["perplexity"]

    if recover == "perp":
        options = {"steps": 24, "accumulate": 1, "lr": 2e-3, "vector_lr": 2e-2, "rank": 4, **options}
    dense, plain = perplexity(checkpoint), perplexity(pruneforge.prune(*asked, **data))
    recovered = perplexity(pruneforge.prune(*asked, **data, recover=recover, recover_options=options))
    assert plain - recovered > share * (plain - dense)


def test_what_a_model_in_bfloat16_is_trained_by_is_float32():
    seen = set()

    class Watched(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            seen.update(each.dtype for group in self.param_groups for each in group["params"])
            return super().step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        pruneforge.prune(tiny_llama(torch.bfloat16), "magnitude", 0.5, None, batches(), **PERP)
    assert seen == {torch.float32}
