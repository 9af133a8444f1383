"""Checkpoints streamed block by block: the same masks, untouched bytes, bounded residence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import run_of, tiny_llama, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.checkpoint.skeleton import make_skeleton
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.engine.chain import Chain
from pruneforge.engine.hidden_states import HiddenStates
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.residency import Streamed
from pruneforge.interfaces.adapter import Adapter
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]


def saved(folder: Path, dtype=torch.float64, shards: bool = True, **changes) -> Path:
    tiny_llama(dtype, **changes).save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("metric", METRICS)
def test_streaming_gives_what_a_run_in_memory_gives(metric, propagate, tmp_path):
    folder = saved(tmp_path / "model")
    before = contents(folder)
    batches = tokens().split(4)
    expected = pruneforge.prune(folder, metric, 0.5, None, batches, propagate=propagate)
    result = pruneforge.prune(folder, metric, 0.5, None, batches, propagate=propagate, output=tmp_path / "out")
    assert contents(folder) == before
    assert list(result.masks) == list(expected.masks)
    for name, mask in expected.masks.items():
        assert torch.equal(result.masks[name], mask), name
    for ours, theirs in zip(result.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for key in ("recipe", "sparsity", "layers", "warnings", "calibration"):
        assert result.report[key] == expected.report[key]


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "gblm"])
def test_wider_scopes_stream_too(metric, scope, tmp_path):
    folder = saved(tmp_path / "model")
    settings = {"options": {"scope": scope}, "propagate": "dense"}
    expected = pruneforge.prune(folder, metric, 0.5, None, [tokens()], **settings)
    result = pruneforge.prune(folder, metric, 0.5, None, [tokens()], output=tmp_path / "out", **settings)
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_keep_their_names_and_every_byte_that_is_not_pruned(dtype, tied, shards, tmp_path):
    folder = saved(tmp_path / "model", dtype, shards, tie_word_embeddings=tied)
    (folder / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    pruneforge.prune(folder, "wanda", 0.5, "2:4", [tokens()], output=tmp_path / "out")
    source, out = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert (len(source.files) > 1) == shards
    assert source.files == out.files
    ours = {"pruneforge.masks", "pruneforge.json", "recipe.yaml"}
    assert set(contents(tmp_path / "out")) == (set(contents(folder)) - {"pytorch_model.bin"}) | ours
    masks = pruneforge.load(tmp_path / "out").masks
    for name, original in contents(folder).items():
        if name.endswith(".safetensors"):
            kept, written = bytearray(original), bytearray((tmp_path / "out" / name).read_bytes())
            for stored in (s for s in source.tensors.values() if s.file == name):
                if stored.name.removesuffix(".weight") in masks:
                    for part in (kept, written):
                        part[stored.start : stored.start + stored.size] = bytes(stored.size)
            assert kept == written
        elif name != "pytorch_model.bin":
            assert (tmp_path / "out" / name).read_bytes() == original
    for layer, mask in masks.items():
        stored = source.tensors[f"{layer}.weight"]
        assert torch.equal(out.read(stored), torch.where(mask, source.read(stored), 0))


def test_an_image_model_of_timm_streams(tmp_path):
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **tiny), str(tmp_path / "model"), safe_serialization=True)
    batches = [{"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}]
    for metric in METRICS:
        expected = pruneforge.prune(tmp_path / "model", metric, 0.5, None, batches)
        result = pruneforge.prune(tmp_path / "model", metric, 0.5, None, batches, output=tmp_path / metric)
        assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())
        loaded = timm.create_model(f"local-dir:{tmp_path / metric}", pretrained=True)
        for ours, theirs in zip(loaded.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("metric", METRICS)
def test_a_model_with_code_between_its_blocks_streams(metric, tmp_path):
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}
    module = timm.create_model("swin_tiny_patch4_window7_224", **tiny, num_classes=5)
    save_for_hf(module, str(tmp_path / "model"), safe_serialization=True)
    batches = [{"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.arange(2)} for _ in range(2)]
    expected = pruneforge.prune(tmp_path / "model", metric, 0.5, None, batches)
    result = pruneforge.prune(tmp_path / "model", metric, 0.5, None, batches, output=tmp_path / "out")
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_that_a_metric_leaves_alone_keep_their_precision(dtype, tmp_path):
    folder = saved(tmp_path / "model", torch.float32)
    result = pruneforge.prune(folder, "wanda", 0.5, None, [tokens()], dtype=dtype, output=tmp_path / "out")
    source, out = Checkpoint(folder), Checkpoint(tmp_path / "out")
    for layer, mask in result.masks.items():
        stored = source.tensors[f"{layer}.weight"]
        assert torch.equal(out.read(stored), torch.where(mask, source.read(stored), 0))


def test_a_single_file_goes_before_an_index_as_in_the_libraries(tmp_path):
    folder = saved(tmp_path / "model", torch.float32)
    tiny_llama(torch.float32, seed=1).save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", folder)
    expected = pruneforge.prune(folder, "magnitude", 0.5)
    result = pruneforge.prune(folder, "magnitude", 0.5, output=tmp_path / "out")
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())


@pytest.mark.parametrize(("scope", "propagate"), [(None, "pruned"), (None, "dense"), ("model", "dense")])
@pytest.mark.parametrize("metric", METRICS)
def test_weights_are_there_only_while_their_block_is_visited(metric, scope, propagate, tmp_path):
    if scope and metric == "sparsegpt":
        pytest.skip("chooses its own comparison groups")
    options = {"scope": scope} if scope else {}
    folder = saved(tmp_path / "model")
    expected = pruneforge.prune(folder, metric, 0.5, None, tokens().split(3), options=options, propagate=propagate)
    registry = loaded_plugins().registry
    adapter: Adapter = registry.create("adapter", "llama")
    module = adapter.skeleton(str(folder), None).module
    make_skeleton(module)
    assert all(parameter.untyped_storage().nbytes() == 8 for parameter in module.parameters())
    blocks = adapter.blocks(module)
    chosen = registry.create("metric", metric, options)
    run = run_of(chosen, blocks, propagate=propagate)
    residency = Streamed(module, blocks, torch.device("cpu"), Checkpoint(folder))
    found = {}

    def look(run, result):
        for index, block in enumerate(blocks):
            here = [parameter.untyped_storage().nbytes() > 8 for parameter in block.module.parameters()]
            assert set(here) == {index == result.index}
        found.update(result.masks)

    # Everything waits on disk: no room is given in memory.
    store = HiddenStates(torch.device("cpu"), 0, 0, tmp_path / "waiting")
    chain = Chain(module, adapter, blocks, residency, store)
    prune_blocks([run], chain, {"": [adapter.batch(ids, module) for ids in tokens().split(3)]}, Progress(), look)
    residency.close()
    assert all(torch.isnan(parameter).all() for parameter in module.parameters())
    assert all(torch.equal(found[name], mask) for name, mask in expected.masks.items())
    assert store.tiers["host"].peak == 0
    assert (store.tiers["disk"].peak > 0) == bool(chosen.requires)


class Noting(Checkpoint):
    """Notes which tensors are read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.read_names = []

    def read(self, stored, pinned=False):
        self.read_names.append(stored.name)
        return super().read(stored, pinned)


def test_a_third_block_is_read_only_when_one_of_two_was_let_go(tmp_path):
    folder = saved(tmp_path / "model")
    adapter: Adapter = loaded_plugins().registry.create("adapter", "llama")
    module = adapter.skeleton(str(folder), None).module
    make_skeleton(module)
    blocks = adapter.blocks(module)
    checkpoint = Noting(folder)
    residency = Streamed(module, blocks, torch.device("cpu"), checkpoint)

    def seen():
        residency._reader.submit(lambda: None).result()  # what was handed to the reader before is done
        return {name.split(".")[2] for name in checkpoint.read_names}

    first = residency.visit(blocks[0])
    first.__enter__()
    assert seen() == {"0", "1"}
    with residency.visit(blocks[1]):
        assert seen() == {"0", "1"}
        first.__exit__(None, None, None)
        assert seen() == {"0", "1", "2"}
    residency.close()


def test_hidden_states_go_to_the_first_place_that_has_room(tmp_path):
    store = HiddenStates(torch.device("cpu"), 0, 100, tmp_path / "waiting")
    values = [torch.randn(10), torch.randn(5, 2).bfloat16(), torch.randn(20, dtype=torch.float64), torch.randn(4)]
    kept = [store.keep(value) for value in values]
    assert [k.path is not None for k in kept] == [False, False, True, False]
    assert all(torch.equal(k.get(), value) for k, value in zip(kept, values, strict=True))
    assert store.tiers["host"].used == 40 + 20 + 16
    assert store.tiers["disk"].used == 160
    file = kept[2].path
    assert file.exists()
    del kept
    assert not file.exists()
    assert store.tiers["host"].used == store.tiers["disk"].used == 0


def test_hidden_states_on_disk_come_back_as_they_lay_in_memory(tmp_path):
    store = HiddenStates(torch.device("cpu"), 0, 0, tmp_path / "waiting")
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)  # kernels look at that, and round by it
    for value in (image, torch.randn(6, 4).T, torch.randn(2, 3, 4), torch.tensor(3.0)):
        kept = store.keep(value)
        assert kept.path is not None
        assert torch.equal(kept.get(), value)
        assert kept.get().stride() == value.stride()


def test_gradient_statistics_are_computed_once_for_a_model_and_its_data(tmp_path, gradient_cache):
    folder, batches = saved(tmp_path / "model"), tokens().split(3)
    pruneforge.prune(folder, "gblm", 0.5, None, batches, output=tmp_path / "first")
    files = sorted(gradient_cache.rglob("*.safetensors"))
    assert len(files) == 3 * 7
    assert not list(gradient_cache.rglob("*.partial"))
    alone = pruneforge.prune(folder, "gblm", 0.6, None, batches)
    again = pruneforge.prune(folder, "gblm", 0.6, None, batches, output=tmp_path / "second")
    assert all(torch.equal(again.masks[name], mask) for name, mask in alone.masks.items())
    assert sorted(gradient_cache.rglob("*.safetensors")) == files
    assert again.report["measured"]["gradient_cache"] == {"reused": 21, "added_bytes": 0}
    # What stands there is what is used: without gradients GBLM is Wanda.
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({key: value * 0 for key, value in load_file(file).items()}, file, metadata)
    wanda = pruneforge.prune(folder, "wanda", 0.5, "2:4", batches)
    zeroed = pruneforge.prune(folder, "gblm", 0.5, "2:4", batches, output=tmp_path / "third")
    assert all(torch.equal(zeroed.masks[name], mask) for name, mask in wanda.masks.items())
    # Other data, another model or another statistic is another matter.
    pruneforge.prune(folder, "gblm", 0.5, None, [tokens(seed=5)], output=tmp_path / "fourth")
    assert len(list(gradient_cache.rglob("*.safetensors"))) == 2 * len(files)
    pruneforge.prune(folder, "gblm", 0.5, None, batches, options={"norm": "l2"}, output=tmp_path / "fifth")
    assert len(list(gradient_cache.rglob("*.safetensors"))) == 3 * len(files)
    pruneforge.prune(saved(tmp_path / "b", seed=1), "gblm", 0.5, None, batches, output=tmp_path / "sixth")
    assert len(list(gradient_cache.rglob("*.safetensors"))) == 4 * len(files)


def test_gradients_outlive_another_triton_and_a_run_does_not(tmp_path, gradient_cache, monkeypatch):
    folder, batches = saved(tmp_path / "model"), tokens().split(3)
    first = pruneforge.prune(folder, "gblm", 0.5, None, batches, output=tmp_path / "first")
    monkeypatch.setattr("pruneforge.runs.provenance.versions", lambda: first.report["versions"] | {"triton": "0.0"})
    again = pruneforge.prune(folder, "gblm", 0.5, None, batches, output=tmp_path / "second")
    assert again.report["measured"]["gradient_cache"] == {"reused": 21, "added_bytes": 0}
    with pytest.raises(PruneForgeError, match=r'is another one: version of triton was .* is "0\.0" now'):
        pruneforge.prune(folder, "gblm", 0.5, None, batches, output=tmp_path / "first", resume=True)


def test_updated_weights_go_on_as_they_are_stored(tmp_path):
    folder = saved(tmp_path / "model", torch.bfloat16)
    settings = {"dtype": "float64", "output": tmp_path / "out"}
    result = pruneforge.prune(folder, "sparsegpt", 0.5, None, [tokens()], **settings)
    # Calibrating the second block on what was written for the first, read back in float64, gives the same masks.
    written = tmp_path / "mixed"
    shutil.copytree(folder, written)
    for name in Checkpoint(folder).files:
        old, new = load_file(folder / name), load_file(tmp_path / "out" / name)
        save_file({k: new[k] if ".layers.0." in k else old[k] for k in old}, written / name, {"format": "pt"})
    settings = {"dtype": "float64", "output": tmp_path / "rest", "exclude": ["model.layers.0.*"]}
    rest = pruneforge.prune(written, "sparsegpt", 0.5, None, [tokens()], **settings)
    for name, mask in rest.masks.items():
        assert torch.equal(mask, result.masks[name]), name
    assert Checkpoint(tmp_path / "out").tensors == Checkpoint(folder).tensors


def test_a_checkpoint_that_cannot_stream_is_held_in_memory_and_the_report_says_so(tmp_path):
    folder = saved(tmp_path / "model", shards=False)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    result = pruneforge.prune(folder, "magnitude", 0.5, output=tmp_path / "out")
    assert "the model was loaded whole" in result.report["warnings"][0]


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    folder, written = saved(tmp_path / "model"), []
    monkeypatch.setattr(Rewrite, "prepare", lambda self: written.append(self))
    with pytest.raises(PruneForgeError, match="memory budget of 1,000,000 bytes is too small"):
        pruneforge.prune(folder, "wanda", 0.5, None, tokens().split(2), output=tmp_path / "out", memory_budget="1MB")
    assert written == []


def test_budgets_are_kept_or_refused(tmp_path):
    folder, batches = saved(tmp_path / "model"), tokens().split(2)
    expected = pruneforge.prune(folder, "wanda", 0.5, None, batches)
    with pytest.raises(PruneForgeError, match="the memory budget of 1,000,000 bytes is too small; this run needs"):
        pruneforge.prune(folder, "wanda", 0.5, None, batches, output=tmp_path / "small", memory_budget="1MB")
    assert not (tmp_path / "small").exists()
    with pytest.raises(PruneForgeError, match="memory budget 'much' is not a number of bytes"):
        pruneforge.prune(folder, "wanda", 0.5, None, batches, output=tmp_path / "small", memory_budget="much")
    result = pruneforge.prune(folder, "wanda", 0.5, None, batches, output=tmp_path / "out", memory_budget="1TiB")
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())
    assert result.report["measured"]["activations_peak"]["host"] > 0
    assert json.loads((tmp_path / "out" / "pruneforge.json").read_text()) == result.report
