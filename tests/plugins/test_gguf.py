"""GGUF files are de-quantised, pruned as what they hold, and written as ordinary checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import PruneForgeError

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What llama.cpp calls the parameters of a block."""
BLOCK = 32
"""Weights that share a scale in Q8_0: int8 times a float16."""


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of queries or keys in llama.cpp's order: the two halves of each head take turns."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return what Q8_0 keeps of a weight."""
    blocks = weight.reshape(-1, BLOCK).double()
    scale = blocks.abs().amax(1, keepdim=True) / 127
    whole = (blocks / scale).round()
    return (whole * scale.half().double()).reshape(weight.shape)


def write(model: transformers.LlamaForCausalLM, path: Path, packed: bool = False) -> Path:
    """Write a LLaMA as GGUF, its layers in Q8_0 or else all in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + number) for number in range(config.vocab_size - 4)] + ['!"', "#$", "<s>", "</s>"])
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(config.vocab_size - 2)
    writer.add_eos_token_id(config.vocab_size - 1)
    outside = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        *_, block, rest = ["", *name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)]
        last = rest.rpartition(".")[2]
        weight = interleaved(weight, heads[last]) if last in heads else weight
        theirs = outside[name] if name in outside else f"blk.{block}.{NAMES[rest]}"
        values = weight.contiguous().numpy()
        if packed and rest in NAMES and values.ndim > 1:
            data = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{theirs}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{theirs}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_pruned_as_the_model_it_was_made_of(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    file = write(model, tmp_path / "tiny.gguf")
    data = [tokens()]

    found = pruneforge.prune(str(file), "wanda", sparsity=0.5, calibration=data, output=tmp_path / "out")
    expected = pruneforge.prune(model, "wanda", sparsity=0.5, calibration=data)

    assert found.masks.keys() == expected.masks.keys()
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in found.masks.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(loaded.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.equal(loaded(data[0]).logits, model(data[0]).logits)
    assert any("those of a GGUF file" in w and "by type: 30 F32" in w for w in found.report["warnings"])


def test_several_runs_which_need_streaming_are_refused_before_and_in_an_estimate(tmp_path: Path) -> None:
    file = write(tiny_llama(torch.float32), tmp_path / "tiny.gguf")

    for each in (pruneforge.prune_each, pruneforge.estimate_each):
        with pytest.raises(PruneForgeError, match="more than one metric or pattern needs a model that is streamed"):
            each(str(file), "magnitude", [0.3, 0.5], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "kept"), [("Q4_0", 1), ("Q5_0", 1), ("Q8_0", 1), ("Q4_1", 0), ("Q5_1", 0)])
def test_which_formats_keep_zeros(kind: str, kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    zero = torch.rand(weight.shape, generator=generator) < 0.5
    weight[zero] = 0
    number = gguf.GGMLQuantizationType[kind]

    back = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), number), number))

    assert bool((back[zero] == 0).all()) == bool(kept)


def test_what_lies_beside_a_file_has_no_part_in_it(tmp_path: Path) -> None:
    file = write(tiny_llama(torch.float32), tmp_path / "tiny.gguf")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    pruneforge.prune(str(file), "magnitude", sparsity=0.5, output=tmp_path / "out")

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("abc") == ["a", "b", "c"]
    assert tokenizer.vocab_size == 96
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == "llama"


def test_what_was_quantised_is_de_quantised(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    file = write(model, tmp_path / "tiny.gguf", packed=True)

    result = pruneforge.prune(str(file), "magnitude", sparsity=0.5, output=tmp_path / "out", dtype="float32")

    loaded = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, kept in result.masks.items():
        weight, dense = loaded[f"{name}.weight"], model.get_parameter(f"{name}.weight").detach()
        np.testing.assert_allclose(weight[kept].detach(), rounded(dense)[kept], rtol=0, atol=1e-6)
    assert any("9 F32, 21 Q8_0" in warning for warning in result.report["warnings"])


def test_an_evaluation_says_it_too(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32, max_position_embeddings=256)
    file = write(model, tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("abcdefgh" * 200)

    results = pruneforge.evaluate(str(file), "perplexity", data=str(tmp_path / "text.txt"), window=32)

    assert results["perplexity"] > 1
    assert any("GGUF" in warning for warning in results["warnings"])


def test_a_folder_of_them_says_what_to_name(tmp_path: Path) -> None:
    file = write(tiny_llama(torch.float32), tmp_path / "tiny.gguf")

    with pytest.raises(PruneForgeError, match=f"1 GGUF; name the file, such as '{file}'"):
        pruneforge.prune(tmp_path, "magnitude", sparsity=0.5)


def test_what_only_bears_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "false.gguf").write_bytes(b"GGUF" + bytes(100))

    with pytest.raises(PruneForgeError, match=r"false\.gguf' is a file, which no adapter takes"):
        pruneforge.prune(tmp_path / "false.gguf", "magnitude", sparsity=0.5)
