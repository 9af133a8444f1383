"""GPT-2's transposed weights, OPT, and their kin: pruned as the reference prunes them, in memory and streamed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import reference
import torch
import transformers
from conftest import tokens
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import pruneforge
from pruneforge import GradientMagnitude, Metric, PruneForgeError
from pruneforge.checkpoint.reader import Checkpoint

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILIES = {
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "opt, norms after and a narrow embedding": {
        "ffn_dim": 64,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "intermediate_size": 64},
    "gptj": {"rotary_dim": 4},
    "gpt_neox": {"intermediate_size": 64},
    "gpt_bigcode": {},
    "bloom": {},
    "falcon": {},
    "phi": {"intermediate_size": 64},
    "starcoder2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "codegen": {"rotary_dim": 4},
    "biogpt": {"intermediate_size": 64},
    "nemotron": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "persimmon": {"intermediate_size": 64},
    "mpt": {},
}

OWN_NAMES = {
    "gpt_neo": {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    "mpt": {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
}
"""What configurations call their sizes that do not know the usual names."""


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name = family.partition(",")[0]
    sizes = {OWN_NAMES.get(name, {}).get(key, key): value for key, value in SMALL.items()}
    config = transformers.AutoConfig.for_model(name, **sizes, **FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def as_linear(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with an ordinary linear module in place of each `Conv1D`."""
    model = copy.deepcopy(model)
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, Conv1D):
                linear = torch.nn.Linear(child.nx, child.nf, dtype=child.weight.dtype)
                linear.weight = torch.nn.Parameter(child.weight.T.contiguous())
                linear.bias = child.bias
                setattr(part, name, linear)
    return model


class Blocks(reference.LanguageModel):
    """The reference's view of a model whose blocks are its first list of modules."""

    @staticmethod
    def blocks(model):
        name, part = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
        return [(f"{name}.{i}", block) for i, block in enumerate(part)]

    @staticmethod
    def counting(sample, inputs):
        flat = inputs.reshape(-1, inputs.shape[-1])  # OPT's MLP receives [tokens, hidden]
        return flat[sample["attention_mask"][0].bool()]


def padded() -> list[dict]:
    """Four sequences of unequal length, padded on the right."""
    mask = torch.ones(4, 24).long()
    for row, length in enumerate([24, 17, 9, 24]):
        mask[row, length:] = 0
    return [{"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(tokens(4), mask, strict=True)]


def batched(samples: list[dict]) -> list[dict]:
    return [{key: torch.cat([s[key] for s in samples[i : i + 2]]) for key in samples[0]} for i in (0, 2)]


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_masks_and_weights_equal_the_reference(family, metric, pattern):
    model, samples = tiny(family), padded()
    expected_model, expected = reference.prune(as_linear(model), metric, samples, pattern=pattern, kind=Blocks)
    text = f"{pattern[0]}:{pattern[1]}" if pattern else None
    result = pruneforge.prune(model, metric, 0.5, text, batched(samples))
    assert list(result.masks) == list(expected)
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name
        ours, theirs = model.get_submodule(name), expected_model.get_submodule(name)
        weight = ours.weight.T if isinstance(ours, Conv1D) else ours.weight
        torch.testing.assert_close(weight, theirs.weight, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_pruned_as_the_reference_prunes_it(family):
    model = tiny(family)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones(1, 24).long()} for row in tokens(4)]
    _, expected = reference.prune(as_linear(model), "gblm", samples, kind=Blocks)
    result = pruneforge.prune(model, "gblm", 0.5, None, tokens(4).split(2))
    assert list(result.masks) == list(expected)
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name


def test_each_samples_gradients_are_plain_autograds():
    """GPT-2's products receive the tokens of all samples in one row."""
    totals = {}

    class Kept(Metric):
        requires = (GradientMagnitude,)

        def score(self, layer, stats):
            totals[layer.name] = stats[GradientMagnitude].total.clone()
            return layer.weight.abs()

    model, samples = tiny("gpt2"), padded()
    expected = reference.sample_gradients(Blocks, as_linear(model), samples)
    pruneforge.prune(model, Kept(), 0.5, None, batched(samples))
    assert list(totals) == list(expected)
    for name, gradients in expected.items():
        torch.testing.assert_close(
            totals[name], torch.stack(gradients).abs().sum(0), rtol=1e-5, atol=1e-8
        )  # its loss is float32


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_saved_and_loaded_as_an_ordinary_folder(family, tmp_path):
    model = tiny(family).float()
    result = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, mask in result.masks.items():
        part = again.get_submodule(name)
        assert torch.equal((part.weight.T if isinstance(part, Conv1D) else part.weight) != 0, mask)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens(2)).logits, model(tokens(2)).logits)


def saved(family: str, folder: Path, prefix: str = "") -> Path:
    """Save a model; with a prefix, as one without its head, whose names lack the prefix."""
    tiny(family).save_pretrained(folder)
    if prefix:
        tensors = load_file(folder / "model.safetensors")
        named = {name.removeprefix(prefix): value for name, value in tensors.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_streaming_gives_what_a_run_in_memory_gives(family, metric, tmp_path):
    folder, batches = saved(family, tmp_path / "model"), batched(padded())
    expected = pruneforge.prune(folder, metric, 0.5, None, batches)
    result = pruneforge.prune(folder, metric, 0.5, None, batches, output=tmp_path / "out")
    assert result.report["warnings"] == []  # it was streamed
    expected.model.save_pretrained(tmp_path / "whole")
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "whole")
    assert list(ours.tensors) == list(theirs.tensors)
    for name, location in ours.tensors.items():
        assert torch.equal(ours.read(location), theirs.read(theirs.tensors[name])), name
    for name, mask in expected.masks.items():
        assert torch.equal(pruneforge.load(tmp_path / "out").masks[name], mask), name


@pytest.mark.parametrize("metric", ["wanda", "sparsegpt"])
def test_transposed_weights_are_rounded_and_kept_in_the_checkpoints_dtype(metric, tmp_path):
    tiny("gpt2").float().save_pretrained(tmp_path / "model")
    result = pruneforge.prune(
        tmp_path / "model", metric, 0.5, None, [tokens()], dtype="bfloat16", output=tmp_path / "out"
    )
    source, out = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "out")
    for layer, mask in result.masks.items():
        before, after = (folder.read(folder.tensors[f"{layer}.weight"]).T for folder in (source, out))
        assert torch.equal(after != 0, mask)
        assert torch.equal(after, torch.where(mask, before, 0)) == (metric == "wanda")


def test_a_checkpoint_of_the_model_without_its_head_streams(tmp_path):
    """As GPT-2's and BLOOM's own checkpoints are."""
    folder = saved("gpt2", tmp_path / "model", prefix="transformer.")
    assert "h.0.attn.c_attn.weight" in Checkpoint(folder).tensors
    expected = pruneforge.prune(folder, "wanda", 0.5, None, [tokens()])
    result = pruneforge.prune(folder, "wanda", 0.5, None, [tokens()], output=tmp_path / "out")
    assert result.report["warnings"] == []
    assert set(Checkpoint(tmp_path / "out").tensors) == set(Checkpoint(folder).tensors)
    for ours, theirs in zip(result.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_wider_scopes_compare_transposed_weights_with_others(scope):
    model = tiny("gpt2")
    weights = {
        name: part.weight.detach().T.abs().clone() for name, part in model.named_modules() if isinstance(part, Conv1D)
    }
    masks = pruneforge.prune(model, "magnitude", 0.5, options={"scope": scope}).masks
    groups = [["h.0."], ["h.1."]] if scope == "block" else [["h.0.", "h.1."]]
    for group in groups:
        names = [name for name in weights if any(part in name for part in group)]
        together = torch.cat([weights[name].flatten() for name in names])
        threshold = together.sort().values[len(together) // 2]
        for name in names:
            assert torch.equal(masks[name], weights[name] >= threshold)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_perplexity_is_that_of_the_plain_protocol(family, tmp_path, checkpoint):
    """With the demo's tokenizer, whose words the models have."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], "vocab_size": len(tokenizer)})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    text = "The quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    result = pruneforge.evaluate(
        model, "perplexity", data=str(tmp_path / "text.txt"), window=32, processor=tokenizer, device="cpu"
    )
    assert result["perplexity"] == pytest.approx(reference.perplexity(model, ids, 32), rel=1e-4)


def test_other_shapes_are_declined_by_name():
    from pruneforge_gpt.adapter import GPT

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    declined = GPT().declines_module(transformers.LlamaForCausalLM(config))
    assert "LlamaDecoderLayer) has linear layers q_proj" in declined
    assert "not GPT's shape" in declined
    with pytest.raises(PruneForgeError, match=r"gpt: block model.decoder.layers.0 \(BartDecoderLayer\)"):
        pruneforge.prune(
            transformers.BartForCausalLM(transformers.BartConfig(d_model=32, vocab_size=96)), "magnitude", 0.5
        )
