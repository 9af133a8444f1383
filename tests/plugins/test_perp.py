"""PERP against plain training loops, what it trains of each architecture, and what it says it left out."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from conftest import tiny_llama, tokens
from torch import nn
from torch.func import functional_call

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.engine.guard import seed_for
from pruneforge.engine.model_recovery import PART

RANK, ALPHA, STEPS = 3, 6, 5


def perp(model, data, sparsity=0.6, **options):
    asked = {"rank": RANK, "alpha": ALPHA, "steps": STEPS, "accumulate": 1, "lr": 3e-3, "vector_lr": 1e-2, **options}
    return pruneforge.prune(model, "magnitude", sparsity, None, data, recover="perp", recover_options=asked)


def pruned(**changes):
    model = tiny_llama(**changes)
    masks = pruneforge.prune(model, "magnitude", 0.6).masks
    return model.requires_grad_(False), masks


def first_factors(masks, model):
    """The factors A as PyTorch draws them for LoRA, one layer after the other, and B."""
    seed_for(0, "model", torch.device("cpu"), PART)
    factors = {}
    for name, mask in masks.items():
        a = torch.empty(RANK, mask.shape[1], dtype=torch.float64)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        factors[name] = a.requires_grad_(), torch.zeros(mask.shape[0], RANK, dtype=torch.float64, requires_grad=True)
    return factors


def trained_plainly(model, ids, values, leaves):
    """AdamW written out, on the next token's mean loss, with the rates of the paper's schedule."""
    moments = {index: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for index, (leaf, _) in enumerate(leaves)}
    for step in range(STEPS):
        share = 1.0 if step == 0 else (STEPS - step) / (STEPS - 1)
        logits = functional_call(model, values(), (ids,)).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, [leaf for leaf, _ in leaves])
        with torch.no_grad():
            for index, ((leaf, lr), gradient) in enumerate(zip(leaves, gradients, strict=True)):
                first, second = moments[index]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                correction = first / (1 - 0.9 ** (step + 1))
                leaf -= share * lr * correction / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return {name: value.detach() for name, value in values().items()}


def test_masklora_is_w_plus_s_ba_under_the_mask_in_a_plain_training_loop():
    ours, ids = tiny_llama(), tokens()
    found = perp(ours, [ids], train=["norms", "masklora"])
    model, masks = pruned()
    factors = first_factors(masks, model)
    norms = {name: p.clone().requires_grad_() for name, p in model.named_parameters() if "norm" in name}

    def values():
        made = dict(norms)
        for name, mask in masks.items():
            a, b = factors[name]
            weight = model.get_submodule(name).weight
            made[f"{name}.weight"] = weight + ALPHA / RANK * (b @ a) * mask
        return made

    leaves = [(leaf, 3e-3) for pair in factors.values() for leaf in pair]
    expected = trained_plainly(model, ids, values, leaves + [(leaf, 1e-2) for leaf in norms.values()])
    for name, parameter in ours.named_parameters():
        wanted = expected.get(name, model.get_parameter(name))
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=1e-9, msg=name)
    assert all(torch.equal(found.masks[name], mask) for name, mask in masks.items())
    moved = ours.model.layers[0].mlp.down_proj.weight - model.model.layers[0].mlp.down_proj.weight
    assert moved.abs().max() > 1e-3


def test_scalelora_is_the_hira_of_peft():
    peft = pytest.importorskip("peft", minversion="0.19")
    ours, ids = tiny_llama(), tokens()
    perp(ours, [ids], train=["scalelora"], alpha=RANK, lr=1e-2)
    model, masks = pruned()
    factors = first_factors(masks, model)
    targets = sorted({name.rpartition(".")[2] for name in masks})
    wrapped = peft.get_peft_model(model, peft.HiraConfig(r=RANK, target_modules=targets, hira_dropout=0.0)).eval()
    leaves = []
    for name, (a, b) in factors.items():
        layer = wrapped.base_model.model.get_submodule(name)
        for held, value in ((layer.hira_A["default"], a), (layer.hira_B["default"], b)):
            held.data = value.detach().clone()
            leaves.append(held)
    optimizer = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1.0 if step == 0 else (STEPS - step) / (STEPS - 1))
        optimizer.zero_grad()
        logits = wrapped(ids).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for name, mask in masks.items():
        weight = ours.get_submodule(name).weight.detach()
        torch.testing.assert_close(weight, merged[f"{name}.weight"].detach(), rtol=1e-6, atol=1e-9)
        assert not weight.masked_fill(mask, 0).any()


def test_accumulated_gradients_are_those_of_the_big_batch():
    models = [tiny_llama(), tiny_llama()]
    perp(models[0], [tokens()], accumulate=1)
    perp(models[1], tokens().split([4, 2]), accumulate=2)  # unequal batches
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_llama_without_biases_trains_the_rest_and_says_how_much():
    model = tiny_llama()
    found = perp(model, tokens().split(3))
    recovery, total = found.report["recovery"], sum(p.numel() for p in model.parameters())
    layers = sum(RANK * sum(mask.shape) for mask in found.masks.values())
    expected = {"biases": 0, "norms": 7 * 64, "head": RANK * (64 + 96), "masklora": layers}
    assert recovery["subsets"] == expected
    assert recovery["trained"]["parameters"] == sum(expected.values())
    assert recovery["trained"]["share"] == pytest.approx(sum(expected.values()) / total, abs=1e-6)
    assert recovery["steps"] == STEPS


def test_nothing_to_train_is_one_line():
    with pytest.raises(PruneForgeError, match="perp has nothing to train: the model has no biases of its own"):
        perp(tiny_llama(), [tokens()], train=["biases"])


def test_a_tied_head_is_left_out_and_said():
    model, before = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    found = perp(model, [tokens()], train=["head", "norms"])
    assert found.report["recovery"]["subsets"] == {"norms": 448, "head": 0}
    said = "the head was not trained: model.embed_tokens.weight and lm_head.weight are one weight of 6,144 values"
    assert found.report["warnings"] == [said]
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_its_own_gets_a_merged_lora():
    model, before = tiny_llama(), tiny_llama()
    perp(model, [tokens()], train=["head"])
    change = (model.lm_head.weight - before.lm_head.weight).detach()
    assert torch.linalg.matrix_rank(change) == RANK
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)


@pytest.mark.parametrize("train", [["biases"], ["norms"], ["head"], ["masklora"], ["scalelora"]])
def test_each_subset_lowers_the_loss_of_a_vision_transformer_and_changes_nothing_else(train):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **settings).double().eval()
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    data = [{"pixel_values": images[:3], "labels": labels[:3]}, {"pixel_values": images[3:], "labels": labels[3:]}]
    pruneforge.prune(model, "magnitude", 0.6)

    def loss():
        with torch.no_grad():
            return nn.functional.cross_entropy(model(images), labels)

    dense, before = {name: p.detach().clone() for name, p in model.named_parameters()}, loss()
    perp(model, data, train=train, steps=20, accumulate=2)  # which prunes the same again
    assert loss() < before - 1e-3
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, dense[name])}
    kinds = {
        "biases": lambda name: name.endswith("bias"),
        "norms": lambda name: "norm" in name,
        "head": lambda name: name == "head.weight",
        "masklora": lambda name: ".attn." in name or ".mlp." in name,
    }
    assert changed
    assert all(kinds[train[0].replace("scale", "mask")](name) for name in changed), changed


@pytest.mark.parametrize("options", [{"train": []}, {"train": ["everything"]}, {"rank": 0}, {"lr": -1}])
def test_wrong_options_are_named(options):
    with pytest.raises(PruneForgeError, match=rf"option {next(iter(options))}\S* of perp"):
        pruneforge.create("recovery", "perp", **options)
