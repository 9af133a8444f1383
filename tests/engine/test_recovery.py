"""Recovery: what remains of a block is changed under masks that stay, in every way a run can go."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import commands
import pytest
import reference
import timm
import torch
from conftest import interrupted_after, outcome, tiny_llama, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import pruneforge
from pruneforge import PruneForgeError, Recovery

RECOVERIES = ("ridge", "reconstruct")


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_llama(torch.float32, attention_bias=True).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def batches():
    return tokens().split(3)


def with_biases(**changes):
    model = tiny_llama(attention_bias=True, **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    return model


def row_by_row(weight, bias, mask, inputs, damping):
    """The remaining weights of each row, and its bias, by least squares over stacked equations, as QR solves them."""
    tokens_, columns = inputs.shape
    centre = inputs.mean(0) if bias is not None else torch.zeros(columns, dtype=inputs.dtype)
    covariance = inputs.T @ inputs / tokens_ - centre.outer(centre)
    lam = damping * covariance.diagonal().mean()
    new, shifts = torch.zeros_like(weight), torch.zeros(len(weight), dtype=weight.dtype)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        wanted = inputs @ weight[row]
        free = inputs[:, kept]
        if bias is not None:  # one more unknown, which nothing holds back
            free = torch.cat([free, torch.ones(tokens_, 1, dtype=inputs.dtype)], 1)
        hold = torch.zeros(len(kept), free.shape[1], dtype=inputs.dtype)
        hold[:, : len(kept)] = torch.eye(len(kept), dtype=inputs.dtype) * (lam * tokens_).sqrt()
        left = torch.cat([free, hold])
        right = torch.cat([wanted, weight[row, kept] * (lam * tokens_).sqrt()])
        solved = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        new[row, kept] = solved[: len(kept)]
        shifts[row] = solved[-1] if bias is not None else 0
    return new, shifts


@pytest.mark.parametrize("metric", ["magnitude", "sparsegpt"])
def test_ridge_solves_each_rows_least_squares_and_moves_its_bias(metric):
    dense, pruned = with_biases(), with_biases()
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens()]
    found = pruneforge.prune(
        pruned, metric, 0.5, None, batches(), propagate="dense", recover="ridge", recover_options={"damping": 0.02}
    )
    for name, block in reference.LanguageModel.blocks(dense):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(reference.LanguageModel, dense, layers, samples)
        for layer, module in layers:
            ours = pruned.get_submodule(layer)
            weight, shift = row_by_row(
                module.weight.detach(), module.bias, found.masks[layer], torch.cat(inputs[layer]), 0.02
            )
            torch.testing.assert_close(ours.weight.detach(), weight, rtol=1e-6, atol=1e-8)
            if module.bias is not None:
                torch.testing.assert_close(ours.bias - module.bias, shift, rtol=1e-6, atol=1e-8)
                assert shift.abs().max() > 1e-4


@pytest.mark.parametrize(("targets", "propagate"), [("dense", "pruned"), ("pruned", "pruned"), ("dense", "dense")])
def test_reconstruction_is_a_plain_training_loop_under_the_masks(targets, propagate):
    dense, pruned, ids = tiny_llama(), tiny_llama(), tokens()
    options = {"lr": 0.02, "epochs": 4, "targets": targets}
    found = pruneforge.prune(
        pruned, "magnitude", 0.6, None, [ids], propagate=propagate, recover="reconstruct", recover_options=options
    )
    expected = copy.deepcopy(dense)
    positions = torch.arange(ids.shape[1])[None]
    hidden = true = dense.model.embed_tokens(ids).detach()
    rope = dense.model.rotary_emb(hidden, positions)
    for index, block in enumerate(expected.model.layers):
        prefix = f"model.layers.{index}."
        with torch.no_grad():
            true_out = dense.model.layers[index](true, position_embeddings=rope)
            on_pruned = dense.model.layers[index](hidden, position_embeddings=rope)
        goal = on_pruned if targets == "pruned" else true_out
        given = true if propagate == "dense" else hidden
        masks = {
            name: found.masks[prefix + name] for name, part in block.named_modules() if prefix + name in found.masks
        }
        for name, mask in masks.items():
            block.get_submodule(name).weight.data *= mask
        parameters = [parameter.requires_grad_() for parameter in block.parameters()]
        rates = [0.02 * max(1e-3, float(p.detach()[p.detach() != 0].square().mean().sqrt())) for p in parameters]
        optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
        for step in range(5):
            for name, mask in masks.items():
                block.get_submodule(name).weight.data *= mask
            if step == 4:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / 4)
            optimizer.zero_grad()
            F.mse_loss(block(given, position_embeddings=rope), goal).backward()
            for name, mask in masks.items():
                block.get_submodule(name).weight.grad *= mask
            optimizer.step()
        with torch.no_grad():
            hidden, true = block(hidden, position_embeddings=rope), true_out
    for (name, ours), theirs in zip(pruned.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.equal(pruned.model.layers[0].input_layernorm.weight, dense.model.layers[0].input_layernorm.weight)


@pytest.mark.parametrize(
    ("metric", "recovery", "pattern"), itertools.product(["magnitude", "sparsegpt", "gblm"], RECOVERIES, [0.6, "2:4"])
)
def test_pruned_weights_stay_zero_and_what_remains_is_nearer_to_the_dense_model(metric, recovery, pattern):
    sparsity, text = (pattern, None) if isinstance(pattern, float) else (None, pattern)
    asked = (metric, sparsity, text, batches())
    options = {"lr": 0.05, "epochs": 5} if recovery == "reconstruct" else {}
    dense, plain, recovered = tiny_llama(), tiny_llama(), tiny_llama()
    pruneforge.prune(plain, *asked)
    found = pruneforge.prune(recovered, *asked, recover=recovery, recover_options=options)
    for name, mask in found.masks.items():
        assert not recovered.get_submodule(name).weight.masked_fill(mask, 0).any()
    assert found.report["recovery"]["name"] == recovery
    with torch.no_grad():
        outputs = [each(tokens()).logits for each in (dense, plain, recovered)]
    before, after = ((logits - outputs[0]).square().mean() for logits in outputs[1:])
    assert after < before


@pytest.mark.parametrize(
    ("recovery", "propagate", "dtype"),
    [
        *itertools.product(RECOVERIES, ["pruned", "dense"], ["float32"]),
        *[(name, "pruned", "bfloat16") for name in RECOVERIES],
    ],
)
def test_a_streamed_run_recovers_as_one_in_memory_and_resumes_to_the_same_bytes(
    recovery, propagate, dtype, model, tmp_path
):
    asked = {"recover": recovery, "propagate": propagate, "dtype": dtype, "exclude": ["*.0.*.down_proj"]}
    expected = pruneforge.prune(model, "wanda", 0.6, None, batches(), **asked)
    whole = pruneforge.prune(model, "wanda", 0.6, None, batches(), output=tmp_path / "whole", **asked)
    with interrupted_after(1):
        pruneforge.prune(model, "wanda", 0.6, None, batches(), output=tmp_path / "out", **asked)
    pruneforge.prune(model, "wanda", 0.6, None, batches(), output=tmp_path / "out", resume=True, **asked)
    assert outcome(tmp_path / "out") == outcome(whole.folder)
    written = dict(AutoModelForCausalLM.from_pretrained(whole.folder, dtype=torch.float32).named_parameters())
    ours = dict(expected.model.named_parameters())
    original = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    changed = [name for name in written if not torch.equal(written[name], original[name])]
    for name in changed if dtype == "bfloat16" else written:  # what did not change keeps the checkpoint's digits
        assert torch.equal(written[name], ours[name].float()), name
    for name, mask in whole.masks.items():
        assert not written[f"{name}.weight"].masked_fill(mask, 0).any()
    assert "model.layers.0.mlp.down_proj.weight" not in changed  # the user left it dense
    assert any(name.endswith("bias") for name in changed)
    if dtype == "float32":  # in bfloat16 the steps of a norm are rounded away
        assert any("layernorm" in name for name in changed) == (recovery == "reconstruct")


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_two_processes_recover_as_one(recovery, checkpoint, tmp_path):
    asked = ("prune", checkpoint, "--metric", "magnitude", "--sparsity", "0.6", "--calibration", "python-docs")
    asked += ("--samples", 6, "--seqlen", 64, "--batch-size", 2, "--dtype", "float64", "--recover", recovery)
    one = commands.run(*asked, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    for done in commands.run_together(2, *asked, "--output", tmp_path / "two"):
        assert done.returncode == 0, done.stderr
    first, second = pruneforge.load(tmp_path / "one").model, pruneforge.load(tmp_path / "two").model
    plain = pruneforge.prune(checkpoint, "magnitude", 0.6).model
    moved = 0.0
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
        moved = max(moved, float((a - c).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_runs_that_share_a_pass_recover_each_its_own_masks(recovery, model, tmp_path):
    asked = {"recover": recovery, "propagate": "dense"}
    together = pruneforge.prune_each(
        model, ["magnitude", "wanda"], [0.5, "2:4"], batches(), output=tmp_path / "all", **asked
    )
    for name, found in together.items():
        metric, _, pattern = name.partition("-")
        sparsity, text = (None, "2:4") if pattern == "2of4" else (0.5, None)
        alone = pruneforge.prune(model, metric, sparsity, text, batches(), output=tmp_path / name, **asked)
        assert outcome(found.folder) == outcome(alone.folder)


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize(
    ("name", "settings", "side"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4}, 32),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48}, 32),
        (  # with code of the model's own between its blocks
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4), "window_size": 7},
            56,
        ),
    ],
)
def test_image_models_recover(name, settings, side, recovery):
    torch.manual_seed(0)
    dense = timm.create_model(name, pretrained=False, num_classes=7, **settings).double().eval()
    plain, recovered = copy.deepcopy(dense), copy.deepcopy(dense)
    images = torch.randn(6, 3, side, side, dtype=torch.float64)
    options = {"lr": 0.03, "epochs": 6} if recovery == "reconstruct" else {}
    asked = ("magnitude", 0.6, None, images.split(3))
    pruneforge.prune(plain, *asked)
    pruneforge.prune(recovered, *asked, recover=recovery, recover_options=options)
    with torch.no_grad():
        far, near = ((model(images) - dense(images)).norm() for model in (plain, recovered))
    assert near < 0.5 * far


def test_reconstruction_recovers_a_third_of_what_a_trained_model_lost(shared_data):
    model, text = shared_data / "stories260K", shared_data / "tinystories.txt"
    asked = (model, "magnitude", 0.6, None, f"{text}[:50%]")

    def perplexity(pruned):
        held_out = f"{text}[50%:60%]"
        return pruneforge.evaluate(pruned, "perplexity", data=held_out, window=512)["perplexity"]

    dense, plain = perplexity(model), perplexity(pruneforge.prune(*asked, samples=64, seqlen=256))
    for recovery in RECOVERIES:
        recovered = perplexity(pruneforge.prune(*asked, samples=64, seqlen=256, recover=recovery))
        assert plain - recovered > (0.35 if recovery == "reconstruct" else 0.25) * (plain - dense)


class Careless(Recovery):
    targets = None

    def recover_block(self, site):
        site.layers[0].parameter.data += 1


class Exploding(Recovery):
    def recover_block(self, site):
        layer = site.layers[0]
        layer.write(site.masks[layer.name], site.dense[layer.name] * 1e300 * 1e300)


class Cheating(Recovery):
    def recover_block(self, site):
        for layer in site.layers:
            site.masks[layer.name].fill_(True)
            layer.matrix().copy_(site.dense[layer.name])


class Spoiling(Recovery):
    requires = (pruneforge.Gram,)

    def recover_block(self, site):
        site.stats[site.layers[0].name][pruneforge.Gram].total.diagonal().add_(1)


class Astray(Recovery):
    targets = "Dense"

    def recover_block(self, site):
        raise AssertionError


class Untargeted(Recovery):
    def recover_block(self, site):
        next(site.batches())


class Failing(Recovery):
    def recover_block(self, site):
        raise SystemExit("enough")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"recover": Careless()},
            "recovery 'careless' moved pruned weights of layer 'model.layers.0.self_attn.q_proj'",
        ),
        ({"recover": Exploding()}, "recovery 'exploding' made 'model.layers.0.self_attn.q_proj.weight' too large"),
        (
            {"recover": Cheating()},
            "recovery 'cheating' moved pruned weights of layer 'model.layers.0.self_attn.q_proj'",
        ),
        (
            {"recover": Spoiling()},
            "recovery 'spoiling' changed statistic Gram of layer 'model.layers.0.self_attn.q_proj' in place",
        ),
        ({"recover": Astray()}, "recovery 'astray' has the targets 'Dense'; they must be None or one of dense, pruned"),
        ({"recover": Untargeted()}, "recovery 'untargeted' has no `targets`, so no batches are kept"),
        ({"recover": Failing()}, "recovery 'failing' failed on block 'model.layers.0': SystemExit: enough"),
        ({"recover": "ridg"}, "unknown recovery 'ridg'; did you mean 'ridge'"),
        ({"recover_options": {"lr": 1}}, "recover options need the name of what they belong to; add `recover`"),
        ({"recover": "ridge", "recover_options": {"damping": 0}}, "option damping=0 of ridge"),
        ({"recover": "ridge", "calibration": None}, "recovery 'ridge' needs calibration data"),
        ({"recover": "reconstruct", "calibration": None}, "recovery 'reconstruct' needs calibration data"),
        (
            {"recover": "reconstruct", "options": {"scope": "model"}, "propagate": "dense"},
            "scope=model prunes once all batches have passed, and recovery 'reconstruct' learns from them",
        ),
    ],
)
def test_what_does_not_go_is_said_in_one_line(settings, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny_llama(), "magnitude", 0.5, **{"calibration": batches(), **settings})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_padding_has_no_say_in_reconstruction():
    valid = torch.ones(6, 24, dtype=torch.long)
    valid[3:, 15:] = 0
    outputs = []
    for filler in (5, 70):
        model = tiny_llama()
        ids = tokens().masked_fill(valid == 0, filler)
        data = [{"input_ids": ids[part], "attention_mask": valid[part]} for part in (slice(0, 3), slice(3, 6))]
        pruneforge.prune(model, "magnitude", 0.5, None, data, recover="reconstruct")
        outputs.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*outputs, strict=True))


def test_what_is_shared_with_the_rest_of_the_model_is_left_alone(tmp_path):
    model, before = tiny_llama(), tiny_llama()
    model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    model.model.layers[0].self_attn.q_proj.weight.grad = torch.ones(64, 64, dtype=torch.float64)
    pruneforge.prune(model, "magnitude", 0.5, None, batches(), recover="reconstruct")
    assert torch.equal(model.model.norm.weight, before.model.norm.weight)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, before.model.layers[0].input_layernorm.weight)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.sum() == 64 * 64  # a user's own
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_estimate_counts_recovery_and_changes_nothing():
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    estimated = pruneforge.estimate(model, "magnitude", batches(), recover="reconstruct")
    assert estimated.seconds["recover"] > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_command_line_takes_a_recovery_with_its_options(checkpoint, tmp_path):
    asked = ("prune", checkpoint, "--metric", "magnitude", "--sparsity", "0.6", "--calibration", "python-docs")
    asked += ("--samples", 2, "--seqlen", 32)
    first = commands.invoke(
        *asked, "--recover", "reconstruct", "--lr", "0.02", "--epochs", 2, "--output", tmp_path / "a"
    )
    assert first.exit_code == 0, first.output
    used = pruneforge.load(tmp_path / "a").report["recovery"]
    assert used["name"] == "reconstruct"
    assert {"lr": 0.02, "epochs": 2, "targets": "dense"}.items() <= used["options"].items()
    again = commands.invoke("prune", checkpoint, "--config", tmp_path / "a" / "recipe.yaml", "--output", tmp_path / "b")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    third = commands.invoke(
        *asked, "--recover", "reconstruct", "--recover-option", "targets=sparse", "--output", tmp_path / "c"
    )
    assert third.exit_code == 2
    assert "option targets='sparse' of reconstruct" in third.output
    assert not (tmp_path / "c").exists()
