"""Checkpoints that are damaged, forged or lead elsewhere are named, and leave no output."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import pruneforge
from pruneforge import Checkpoint, PruneForgeError
from pruneforge.checkpoint.tensors import read_header


def saved(folder: Path, shards: bool = True) -> Path:
    tiny_llama(torch.float64).save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    return folder


def break_truncated(folder):
    file = next(folder.glob("model-00002*"))
    file.write_bytes(file.read_bytes()[:-100])
    return "is truncated: tensor"


def break_header(folder):
    file = next(folder.glob("model-00002*"))
    file.write_bytes(file.read_bytes()[:50])
    return "is truncated: it ends within its header"


def break_missing(folder):
    next(folder.glob("model-00002*")).unlink()
    return "names 'model-00002"


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return "is damaged"


def break_shape(folder):
    return rewrite_one(folder, lambda value: value[:-1].clone(), "by config.json")


def break_dtype(folder):
    return rewrite_one(folder, lambda value: value.to(torch.int8), "weights must be floating-point numbers")


def rewrite_one(folder, change, said):
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / Checkpoint(folder).tensors[name].file
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name])}, file, {"format": "pt"})
    return said


def break_index_with_a_path(folder):
    return in_index(folder, "../elsewhere.safetensors", "is not the name of a file in the folder")


def test_an_index_that_nothing_reads_does_not_matter(tmp_path):
    model = saved(tmp_path / "model", shards=False)
    (model / "notes.index.json").write_text("[]")
    (model / "more.index.json").write_text('{"weight_map": null}')
    (model / "pytorch_model.bin.index.json").write_text("{")
    (model / "folder.index.json").mkdir()
    (model / "dangling.index.json").symlink_to("nowhere")
    pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "out")
    assert pruneforge.load(tmp_path / "out").report["sparsity"]["reached"] == 0.5


def break_index_with_a_link(folder):
    index = folder / "model.safetensors.index.json"
    index.rename(folder.parent / "elsewhere.json")
    index.symlink_to(folder.parent / "elsewhere.json")
    return "is a link out of the model's folder"


def break_index_with_another_file(folder):
    return in_index(folder, "config.json", "is not the name of a safetensors file in the folder")


def break_index_with_a_number(folder):
    return in_index(folder, 7, "names 7, which is not the name of a safetensors file in the folder")


def in_index(folder, file, said):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(content))
    return said


def break_with_a_link(folder):
    file = next(folder.glob("model-00002*"))
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")
    return "is a link out of the model's folder"


def break_with_a_link_beside(folder):
    (folder.parent / "secret").write_text("a key")
    (folder / "vocabulary.txt").symlink_to("../secret")
    return "is a link out of the model's folder"


def break_with_a_pipe(folder):
    os.mkfifo(folder / "tokenizer.json")
    return "is not a regular file"


def break_with_an_infinite_norm(folder):
    return in_tensor(folder, "model.layers.1.input_layernorm.weight", math.inf)


def break_with_an_embedding_that_is_no_number(folder):
    return in_tensor(folder, "model.embed_tokens.weight", math.nan)


def in_tensor(folder, name, value):
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / listed[name])
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / listed[name], {"format": "pt"})
    return f"{name!r} holds values that are not finite; the model is damaged"


@pytest.mark.parametrize("damage", [break_ for name, break_ in sorted(globals().items()) if name.startswith("break_")])
def test_damaged_checkpoints_are_named_and_leave_no_output(damage, tmp_path):
    folder = saved(tmp_path / "model")
    said = damage(folder)
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(folder, "magnitude", 0.5, output=tmp_path / "out")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_named_too():
    model = tiny_llama()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(PruneForgeError, match=r"'model.norm.weight' holds values that are not finite"):
        pruneforge.prune(model, "magnitude", 0.5)


def test_layers_that_are_excluded_are_looked_at_too(tmp_path):
    folder = saved(tmp_path / "model")
    said = in_tensor(folder, "model.layers.2.mlp.down_proj.weight", math.nan)
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(folder, "magnitude", 0.5, exclude=["*.down_proj"], output=tmp_path / "out")


def test_links_within_a_folder_and_of_the_hubs_cache_are_followed(tmp_path):
    folder = saved(tmp_path / "model", shards=False)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    expected = pruneforge.prune(folder, "magnitude", 0.5, output=tmp_path / "within")
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (cache / "blobs" / name).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    result = pruneforge.prune(snapshot, "magnitude", 0.5, output=tmp_path / "cached")
    assert not any(path.is_symlink() for path in (tmp_path / "cached").iterdir())
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())


def test_files_that_are_not_taken_over_are_named(tmp_path):
    folder = saved(tmp_path / "model", shards=False)
    (folder / "recipe.yaml").write_text("quant_stage: {}\n")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "1_Pooling").mkdir()
    (folder / "vocabulary.txt").write_text("a b c")
    result = pruneforge.prune(folder, "magnitude", 0.5, output=tmp_path / "out")
    (warning,) = [text for text in result.report["warnings"] if "not taken over" in text]
    assert all(repr(name) in warning for name in ("recipe.yaml", "pytorch_model.bin", "1_Pooling"))
    assert "vocabulary" not in warning
    assert (tmp_path / "out" / "vocabulary.txt").read_text() == "a b c"
    again = pruneforge.prune(tmp_path / "out", "magnitude", 0.6, output=tmp_path / "again")
    assert not any("not taken over" in text for text in again.report["warnings"])


def entry(start, end, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


FORGED = {
    "two tensors in one place": ({"a": entry(0, 16), "b": entry(0, 16)}, 16),
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, 24),
    "gap": ({"a": entry(0, 16), "b": entry(20, 36)}, 36),
    "first tensor late": ({"a": entry(4, 20)}, 20),
    "negative": ({"a": entry(-16, 0)}, 16),
    "backwards": ({"a": entry(16, 0)}, 16),
    "bytes at the end": ({"a": entry(0, 16)}, 20),
    "wrong size": ({"a": entry(0, 12)}, 12),
    "negative shape": ({"a": entry(0, 16, shape=(-2, -2))}, 16),
    "shape beyond 64 bits": ({"a": entry(0, 16, shape=(2**70,))}, 16),
    "fractional offsets": ({"a": entry(0.0, 16.5)}, 16),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": entry(0, 16)}, 16),
    "metadata of a list": ({"__metadata__": [], "a": entry(0, 16)}, 16),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16),
    "shape of text": ({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}, 16),
    "three offsets": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}, 16),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": []}}, 16),
    "unknown dtype": ({"a": entry(0, 16, dtype="F99")}, 16),
    "an entry that is text": ({"a": "x"}, 16),
    "a list": ([], 0),
    "deep": ("[" * 5_000 + "]" * 5_000, 0),
    "no UTF-8": (b"\xff\xfe", 0),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_header_that_the_library_refuses_is_refused(case, tmp_path):
    content, size = FORGED[case]
    text = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(PruneForgeError) as error:
        read_header(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as opened:
        opened.write((200_000_000).to_bytes(8, "little"))
        opened.truncate(200_000_100)  # sparse: it takes no room on the disk
    with pytest.raises(PruneForgeError, match="its header has 200,000,000 bytes"):
        read_header(file)
