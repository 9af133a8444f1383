"""Pruned weights stay zero under optimizers, a real Trainer, and merged adapters."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import PruneForgeError

OPTIMIZERS = {
    "momentum": lambda each: torch.optim.SGD(each, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda each: torch.optim.AdamW(each, lr=0.01, weight_decay=0.5),
    "fused": lambda each: torch.optim.AdamW(each, lr=0.01, weight_decay=0.5, fused=True),
    "rmsprop": lambda each: torch.optim.RMSprop(each, lr=0.001, momentum=0.9, weight_decay=0.1),
}


def pruned(dtype=torch.float32, **settings):
    return pruneforge.prune(tiny_llama(dtype), "magnitude", 0.5, **settings)


def transposed():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()
    return pruneforge.prune(model, "magnitude", 0.5)


def train(model, optimizer, steps=3, clip=None):
    norms = []
    for step in range(steps):
        ids = tokens(seed=step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if clip:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    return norms


def assert_zeros(result, model=None):
    pruneforge.check_zeros(model or result.model, result.masks)


@pytest.mark.parametrize("make", [pruned, transposed])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_optimizer_moves_a_zero(name, make):
    result = make()
    before = {name: parameter.clone() for name, parameter in result.model.named_parameters()}
    with pruneforge.keep_zeros(result.model, result.masks):
        train(result.model, OPTIMIZERS[name](result.model.parameters()))
        assert_zeros(result)
    assert all(not torch.equal(before[name], parameter) for name, parameter in result.model.named_parameters())
    train(result.model, OPTIMIZERS[name](result.model.parameters()), 1)
    with pytest.raises(PruneForgeError, match=r"\d+ of \d+ pruned weights are not zero, in \d+ layers such as"):
        assert_zeros(result)


def test_training_is_that_of_weights_times_masks():
    """The reference trains free weights and multiplies them by the masks in the forward pass, by the chain rule."""
    result, free = pruned(torch.float64), pruned(torch.float64).model
    masks = {f"{name}.weight": mask for name, mask in result.masks.items()}
    rates = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    with pruneforge.keep_zeros(result.model, result.masks):
        ours = train(result.model, torch.optim.SGD(result.model.parameters(), **rates), 3, clip=0.1)
    parameters = dict(free.named_parameters())
    optimizer, norms = torch.optim.SGD(parameters.values(), **rates), []
    for step in range(3):
        ids = tokens(seed=step)
        used = {name: each * masks[name] if name in masks else each for name, each in parameters.items()}
        optimizer.zero_grad()
        torch.func.functional_call(free, used, kwargs={"input_ids": ids, "labels": ids}).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1)))
        optimizer.step()
    torch.testing.assert_close(ours, norms)
    for name, parameter in result.model.named_parameters():
        torch.testing.assert_close(parameter, parameters[name] * masks.get(name, 1))


def test_momentum_from_before_does_not_move_zeros_either():
    result = pruned()
    optimizer = OPTIMIZERS["momentum"](result.model.parameters())
    train(result.model, optimizer, 1)
    for name, mask in result.masks.items():
        result.model.get_submodule(name).weight.data *= mask
    with pruneforge.keep_zeros(result.model, result.masks) as kept:
        train(result.model, optimizer, 2)
        assert kept.lost() == {}
        layer = next(iter(result.masks))
        result.model.get_submodule(layer).weight.data += 1
        assert kept.lost() == {layer: int((~result.masks[layer]).sum())}
        kept.enforce()
    assert_zeros(result)


def test_masks_may_be_a_folder_and_have_to_fit(tmp_path):
    result = pruned(output=tmp_path / "out")
    pruneforge.keep_zeros(result.model, tmp_path / "out").remove()
    with pytest.raises(PruneForgeError, match="pruned weights are not zero"):
        pruneforge.keep_zeros(tiny_llama(torch.float32), tmp_path / "out")
    with pytest.raises(PruneForgeError, match=r"has no layer 'model\.layers\.2"):
        pruneforge.keep_zeros(tiny_llama(num_hidden_layers=2), tmp_path / "out")
    with pytest.raises(PruneForgeError, match=r"it must be boolean \(128, 64\)"):
        pruneforge.keep_zeros(tiny_llama(intermediate_size=128), tmp_path / "out")


def test_a_trainer_keeps_zeros(tmp_path):
    from pruneforge_transformers.training import KeepZeros

    result = pruned()
    before = result.model.model.layers[0].mlp.up_proj.weight.clone()
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, weight_decay=0.1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(result.model, settings, train_dataset=rows, callbacks=[KeepZeros(result.masks)])
    trainer.train()
    assert_zeros(result)
    assert not torch.equal(before, result.model.model.layers[0].mlp.up_proj.weight)


def test_zeros_that_something_else_lost_are_an_error_at_the_end():
    result = pruned()
    kept = pruneforge.keep_zeros(result.model, result.masks)
    for parameter in result.model.parameters():
        parameter.data.add_(1)  # by no optimizer of torch's
    with pytest.raises(PruneForgeError, match="pruned weights are not zero"), kept:
        pass


def test_adapters_are_merged_under_the_masks():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    result = pruned()
    given = {name: each.detach().clone() for name, each in result.model.named_parameters()}

    def adapted():
        torch.manual_seed(0)
        model = tiny_llama(torch.float32)
        model.load_state_dict(result.model.state_dict())
        settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=6, lora_dropout=0.0)
        model = peft.get_peft_model(model, settings)
        train(model, torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01))
        return model

    with pytest.raises(PruneForgeError, match="pruned weights are not zero, in 6 layers"):
        pruneforge.check_zeros(adapted().merge_and_unload(), result.masks)
    trained = adapted()
    values = {name: each.detach().clone() for name, each in trained.named_parameters() if "lora" in name}
    merged = pruneforge.merge_under_masks(trained, result.masks)
    assert_zeros(result, merged)
    for name, mask in result.masks.items():
        expected = given[f"{name}.weight"]
        if name.endswith(("q_proj", "down_proj")):
            first, second = (values[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
            expected = expected + 3 * (second @ first) * mask
            assert not torch.equal(expected, given[f"{name}.weight"])
        torch.testing.assert_close(merged.get_submodule(name).weight, expected)
    with pytest.raises(PruneForgeError, match="has no adapters to merge"):
        pruneforge.merge_under_masks(tiny_llama(), result.masks)
