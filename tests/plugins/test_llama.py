"""Every family the LLaMA adapter claims loads, runs, and is pruned as the reference prunes it."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import reference
import torch
import transformers
from conftest import run_of, tiny_llama, tokens

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.engine.budget import Budgets
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.plugins import loaded_plugins

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SLIDING = ["sliding_attention", "full_attention"] * 2

FAMILIES = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied embeddings": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8, "layer_types": SLIDING},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "layer_types": SLIDING},
    "gemma3_text": {"sliding_window": 8, "layer_types": SLIDING},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {},
    "olmo2": {},
    "phi3": {},
    "seed_oss": {},
    "cohere2": {"sliding_window": 8, "layer_types": SLIDING},
}


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.partition(",")[0], **SMALL, **FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_pruned_as_the_reference_prunes_it(family):
    model = tiny(family)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones(1, 24).long()} for row in tokens(4)]
    _, expected = reference.prune(model, "wanda", samples)
    result = pruneforge.prune(copy.deepcopy(model), "wanda", 0.5, None, tokens(4).split(2))
    per_block = len(expected) // 4
    assert per_block in (4, 7)
    assert list(result.masks) == list(expected)
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3", "qwen2"])
def test_gradients_follow_each_blocks_own_masks_and_positions(family):
    model = tiny(family)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones(1, 24).long()} for row in tokens(4)]
    _, expected = reference.prune(model, "gblm", samples)
    result = pruneforge.prune(copy.deepcopy(model), "gblm", 0.5, None, tokens(4).split(2))
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_saved_and_loaded_as_an_ordinary_folder(family, tmp_path):
    model = tiny(family).float()
    result = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, mask in result.masks.items():
        assert torch.equal(again.get_submodule(name).weight != 0, mask)
    with torch.no_grad():
        assert torch.equal(again(tokens(2)).logits, model(tokens(2)).logits)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            transformers.BartConfig(d_model=32, vocab_size=96, encoder_layers=2, decoder_layers=2),
            "(BartDecoderLayer) has linear layers",
        ),
        (
            transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
            "MixtralDecoderLayer) has linear layers",
        ),
    ],
)
def test_other_architectures_are_declined_with_a_reason(config, said):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(model, "magnitude", 0.5)
    assert "no adapter takes" in str(error.value)
    assert "llama: " in str(error.value)
    assert said in str(error.value)


def test_a_module_that_is_no_transformers_model_is_declined():
    with pytest.raises(PruneForgeError, match="Linear is not a transformers model"):
        pruneforge.prune(torch.nn.Linear(4, 4), "magnitude", 0.5)


def test_a_weight_that_two_layers_share_is_refused():
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(PruneForgeError, match=r"layers\.0\.self_attn\.q_proj.*layers\.1\.self_attn\.q_proj.*share"):
        pruneforge.prune(model, "magnitude", 0.5)


def test_loss_is_the_models_own():
    model = tiny_llama()
    adapter = loaded_plugins().registry.create("adapter", "llama")
    ids = tokens(3)
    batch = adapter.batch(ids, model)
    losses = adapter.losses(adapter.forward(model, batch), batch)
    assert losses.shape == (3,)
    for row, loss in zip(ids, losses, strict=True):
        assert loss.item() == pytest.approx(model(row[None], labels=row[None]).loss.item(), rel=1e-6)


IDS = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (torch.rand(2, 3), "token ids"),
        (torch.zeros(0, 4).long(), "token ids"),
        (torch.zeros(3).long(), "token ids"),
        ({"x": torch.ones(1)}, "token ids"),
        ([1, 2, 3], "got list"),
        (IDS * 96, "token id 96, and the model knows 0 to 95"),
        (-IDS, "token id -1"),
        (torch.ones(1, 65).long(), "65 tokens long, and the model's context is 64"),
        (
            {"input_ids": IDS, "attention_mask": torch.zeros(2, 3)},
            "attention_mask (2, 3) does not fit input_ids (2, 4)",
        ),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, "attention_mask of a batch must be a tensor"),
        ({"input_ids": IDS, "attention_mask": IDS * torch.tensor([[1], [0]])}, "all padding"),
    ],
)
def test_batches_that_do_not_fit_are_refused(data, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny_llama(), "wanda", 0.5, None, [data])
    assert said in str(error.value)


def test_batches_of_int32_are_as_good():
    masks = [pruneforge.prune(tiny_llama(), "gblm", 0.5, None, [ids]).masks for ids in (tokens(), tokens().int())]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_text_model_of_a_multimodal_one_is_found():
    text = transformers.Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=SLIDING)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    result = pruneforge.prune(model, "gblm", 0.5, None, tokens(4).split(2))
    assert len(result.masks) == 4 * 7
    assert all("language_model.layers" in name for name in result.masks)


def test_quantised_checkpoints_are_declined(tmp_path):
    transformers.LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(tmp_path)
    with pytest.raises(PruneForgeError, match="the checkpoint is quantised"):
        pruneforge.prune(tmp_path, "magnitude", 0.5)


def test_training_mode_and_forward_are_restored():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    patched = model.model.layers[1]
    calls = []
    own = patched.forward
    patched.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)  # as accelerate does
    hooked = patched.forward
    pruneforge.prune(model, "gblm", 0.5, None, [tokens()])
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert patched.forward is hooked
    assert len(calls) == 4  # forward and backward for gradients, calibrate, propagate
    assert all("forward" not in vars(layer) for layer in model.model.layers if layer is not patched)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_made_a_few_tokens_at_a_time_are_those_of_plain_cross_entropy(dtype, monkeypatch):
    adapter = loaded_plugins().registry.create("adapter", "llama")
    module = sys.modules["pruneforge_transformers.tokens"]
    ids = tokens(3, 10)
    logits = torch.randn(3, 10, 96, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    rows = [torch.nn.functional.cross_entropy(wide[n, :-1], ids[n, 1:]) for n in range(3)]
    (expected,) = torch.autograd.grad(sum(rows), wide)
    monkeypatch.setattr(module, "PART", 5 * 96)  # 27 tokens in parts of 5
    batch = adapter.batch(ids, tiny_llama())
    losses = adapter.losses(SimpleNamespace(logits=logits), batch)
    (found,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses, torch.stack(rows))
    torch.testing.assert_close(found, expected.to(dtype))


def test_logits_and_attention_count_in_the_budget_of_a_metric_that_looks_at_gradients(monkeypatch):
    adapter = loaded_plugins().registry.create("adapter", "llama")
    narrow, wide = (LoadedModel(tiny_llama(vocab_size=size), adapter, None, "tiny") for size in (96, 96_000))
    monkeypatch.setattr("pruneforge.engine.budget.resident_bytes", lambda: 0)  # it changes from one moment to the next
    cpu, on_device = torch.device("cpu"), torch.device("meta")
    monkeypatch.setattr("pruneforge.engine.budget.free_on_device", lambda device: 1 << 44)

    def left(model, name, device=cpu, samples=64, length=64):
        blocks, metric = adapter.blocks(model.module), loaded_plugins().registry.create("metric", name)
        batch = adapter.batch(torch.zeros(samples, length, dtype=torch.int64), model.module)
        return sum(Budgets(1 << 40, 1 << 40).for_activations([run_of(metric, blocks)], model, [batch], device))

    def outside(model):  # embedding and head, where they take more than a second block
        block = sum(p.nbytes for p in model.module.model.layers[0].parameters())
        return max(block, 2 * model.module.lm_head.weight.nbytes + model.module.model.norm.weight.nbytes)

    more = outside(wide) - outside(narrow)
    assert left(narrow, "wanda") - left(wide, "wanda") == more
    # One sample has 6.1 M logits, so 21 of the 64 pass the head together, which takes more than a block's sums.
    assert left(wide, "wanda") - left(wide, "gblm") > 19 * 21 * 64 * 96_000
    assert left(wide, "gblm", samples=21) == left(wide, "gblm", samples=64)
    # On a device attention takes a number for each of four heads and each pair of tokens, of every sample.
    attention = 20 * 4 * 64**2
    assert left(narrow, "gblm", on_device, 1) - left(narrow, "gblm", on_device, 2) == attention
    assert left(narrow, "gblm", cpu, 1) == left(narrow, "gblm", cpu, 2)
