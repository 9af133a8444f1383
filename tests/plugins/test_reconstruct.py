"""What `reconstruct` trains: weights alone, or low-rank terms under the masks; against a plain loop in float64."""

from __future__ import annotations

import copy

import experts
import pytest
import torch
import transformers
from conftest import tiny_llama, tokens
from torch.nn import functional as F

import pruneforge
import pruneforge_reconstruct.recovery as reconstruct


@pytest.fixture
def starts(monkeypatch):
    """The first A of every layer's term, by layer name."""
    kept = {}

    class Recorded(reconstruct.MaskLoRA):
        def __init__(self, layer, mask, options):
            super().__init__(layer, mask, options)
            kept[layer.name] = self.a.detach().clone()

    monkeypatch.setattr(reconstruct, "MaskLoRA", Recorded)
    return kept


def size(values):
    return max(1e-3, float(values[values != 0].square().mean().sqrt()))


@pytest.mark.parametrize("train", ["weights", "masklora"])
@pytest.mark.parametrize("targets", ["dense", "pruned"])
def test_training_is_a_plain_loop(train, targets, starts):
    dense, pruned, ids = tiny_llama(), tiny_llama(), tokens()
    options = {"train": train, "lr": 0.05, "epochs": 4, "targets": targets}
    options |= {"rank": 3, "alpha": 6.0} if train == "masklora" else {}
    found = pruneforge.prune(pruned, "magnitude", 0.6, None, [ids], recover="reconstruct", recover_options=options)
    expected = copy.deepcopy(dense).requires_grad_(False)
    hidden = true = dense.model.embed_tokens(ids).detach()
    rope = dense.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for index, block in enumerate(expected.model.layers):
        prefix = f"model.layers.{index}."
        with torch.no_grad():
            true = dense.model.layers[index](true, position_embeddings=rope)
            goal = dense.model.layers[index](hidden, position_embeddings=rope) if targets == "pruned" else true
        masks = {n: found.masks[prefix + n] for n, _ in block.named_modules() if prefix + n in found.masks}
        weights = {n: block.get_submodule(n).weight.detach() * mask for n, mask in masks.items()}
        if train == "weights":
            trained = {n: [weight.clone().requires_grad_()] for n, weight in weights.items()}
            rates = {n: 0.05 * size(weight) for n, weight in weights.items()}
        else:
            trained = {
                n: [starts[prefix + n].clone().requires_grad_(), weight.new_zeros(len(weight), 3).requires_grad_()]
                for n, weight in weights.items()
            }
            rates = {n: 0.05 * size(a.detach()) for n, (a, _) in trained.items()}

        def used(trained=trained, weights=weights, masks=masks):
            if train == "weights":
                return {n: weight * masks[n] for n, (weight,) in trained.items()}
            return {n: weights[n] + 2.0 * (b @ a) * masks[n] for n, (a, b) in trained.items()}

        optimizer = torch.optim.Adam([{"params": each, "lr": rates[n]} for n, each in trained.items()])
        for step in range(4):
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate * (1 - step / 4)
            optimizer.zero_grad()
            changed = {f"{n}.weight": weight for n, weight in used().items()}
            output = torch.func.functional_call(block, changed, (hidden,), {"position_embeddings": rope})
            F.mse_loss(output, goal).backward()
            optimizer.step()
        for n, weight in used().items():
            block.get_submodule(n).weight.data.copy_(weight.detach())
        with torch.no_grad():
            hidden = block(hidden, position_embeddings=rope)
    for (name, ours), theirs in zip(pruned.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=name)
    pruneforge.check_zeros(pruned, found.masks)
    changed = {name.removesuffix(".weight") for name in found.report["updated"]}
    assert changed == set(found.masks)


@pytest.fixture
def mixtures():
    with experts.registered():
        yield


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).double().eval()
    )


@pytest.mark.parametrize("make", [gpt2, experts.tiny])
def test_transposed_weights_and_slices_learn_low_rank_terms_too(make, mixtures):
    dense, plain, recovered = make(), make(), make()
    pruneforge.prune(plain, "magnitude", 0.6, None, [tokens()])
    options = {"train": "masklora", "lr": 0.1, "epochs": 20}
    found = pruneforge.prune(
        recovered, "magnitude", 0.6, None, [tokens()], recover="reconstruct", recover_options=options
    )
    pruneforge.check_zeros(recovered, found.masks)
    with torch.no_grad():
        outputs = [each(tokens()).logits for each in (dense, plain, recovered)]
    before, after = ((logits - outputs[0]).square().mean() for logits in outputs[1:])
    assert after < 0.9 * before
