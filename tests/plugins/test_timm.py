"""timm models: every claimed family, masks as the reference makes them, timm's own layout in and out."""

from __future__ import annotations

import copy
import json

import pytest
import reference
import timm
import torch

import pruneforge
from pruneforge import PruneForgeError

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 32)}

# Family: timm name, arguments that make it tiny, side of its images. docs/reference/models.md shows this table.
FAMILIES = {
    "ViT": ("vit_tiny_patch16_224", VIT, 32),
    "ViT, CLIP": ("vit_base_patch16_clip_224", VIT, 32),
    "ViT with registers (DINOv2)": ("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 16}, 32),
    "ViT with q/k norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}, 32),
    "ViT, parallel blocks": ("vit_small_patch16_36x1_224", VIT, 32),
    "ViT, parallel pairs": ("vit_small_patch16_18x2_224", VIT, 32),
    "ViT, dynamic image size": ("vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}, 48),
    "DeiT": ("deit_tiny_patch16_224", VIT, 32),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "DeiT-3": ("deit3_small_patch16_224", VIT, 32),
    "BEiT": ("beit_base_patch16_224", VIT, 32),
    "BEiT v2": ("beitv2_base_patch16_224", VIT, 32),
    "EVA": ("eva_giant_patch14_224", VIT, 32),
    "EVA-02": ("eva02_tiny_patch14_224", VIT, 32),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
        32,
    ),
    "Swin v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
        32,
    ),
    "ConvNeXt": ("convnext_tiny", STAGES, 64),
    "ConvNeXt, 1x1 convolutions": ("convnext_atto", STAGES, 64),
    "ConvNeXt v2": ("convnextv2_tiny", STAGES, 64),
    "MLP-Mixer": ("mixer_s16_224", {"img_size": 32}, 32),
}


def tiny(family: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    name, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments).to(dtype).eval()
    for parameter in model.parameters():  # trained models have no zero biases and no tiny layer scales
        parameter.data += 0.02 * torch.randn(parameter.shape, dtype=dtype)
    return model


def samples(family: str, count: int = 5, dtype: torch.dtype = torch.float64) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    side = FAMILIES[family][2]
    images = torch.randn(count, 3, side, side, generator=generator, dtype=dtype)
    labels = torch.randint(7, (count,), generator=generator)
    return [{"pixel_values": images[i : i + 1], "labels": labels[i : i + 1]} for i in range(count)]


def batched(rows: list[dict], size: int = 2) -> list[dict]:
    keys = ("pixel_values", "labels")
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{key: torch.cat([row[key] for row in chunk]) for key in keys if key in chunk[0]} for chunk in chunks]


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["DeiT, distilled", "ViT with registers (DINOv2)", "Swin"])
def test_masks_and_weights_equal_the_reference_in_float64(family, metric, pattern):
    model, rows = tiny(family), samples(family)
    expected_model, expected = reference.prune(model, metric, rows, pattern=pattern, kind=reference.TimmModel)
    result = pruneforge.prune(model, metric, 0.5, "2:4" if pattern else None, batched(rows))
    assert list(result.masks) == list(expected)
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name
    for (name, ours), theirs in zip(result.model.named_parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["DeiT, distilled", "ViT with registers (DINOv2)"])
def test_masks_agree_in_float32_to_one_in_a_thousand(family, metric, pattern):
    model, rows = tiny(family, torch.float32), samples(family)
    _, expected = reference.prune(
        copy.deepcopy(model).double(), metric, rows, pattern=pattern, kind=reference.TimmModel
    )
    result = pruneforge.prune(model, metric, 0.5, "2:4" if pattern else None, batched(rows))
    agree = sum((result.masks[name] == expected[name]).sum().item() for name in expected)
    assert agree / sum(mask.numel() for mask in expected.values()) >= 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_pruned_saved_and_loaded_by_timm(family, tmp_path):
    model, rows = tiny(family, torch.float32), samples(family, dtype=torch.float32)
    result = pruneforge.prune(model, "gblm", 0.5, None, batched(rows), output=tmp_path / "out")
    assert len(result.masks) >= 4
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    image = rows[0]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    for name, mask in result.masks.items():
        weight = again.get_parameter(f"{name}.weight").flatten(1)
        assert (weight[~mask] == 0).all()
        assert mask.float().mean() == pytest.approx(0.5, abs=0.6 / mask.shape[1])  # odd rows round down


@pytest.mark.parametrize("family", ["ConvNeXt", "ConvNeXt, 1x1 convolutions", "MLP-Mixer", "DeiT-3", "EVA-02", "BEiT"])
def test_every_layer_sees_what_the_models_own_forward_shows_it(family):
    """Column squares of the dense model, against forward hooks on the whole model."""
    model, rows = tiny(family), samples(family)
    seen: dict = {}

    class Look(pruneforge.Metric):
        requires = (pruneforge.ColumnSquares,)

        def score(self, layer, stats):
            seen[layer.name] = stats[pruneforge.ColumnSquares].total.clone()
            return layer.weight.abs()

    expected: dict = {}

    def hook(module, args, name):
        value = args[0].detach()
        if isinstance(module, torch.nn.Conv2d):
            value = value.permute(0, 2, 3, 1)
        squares = value.reshape(-1, value.shape[-1]).square().sum(0)
        expected[name] = expected.get(name, 0) + squares

    whole = copy.deepcopy(model)
    pruneforge.prune(model, Look(), 0.0, None, batched(rows))
    for name in seen:
        # EVA-02 and BEiT take qkv's weight and multiply by themselves; what attention receives is what qkv does.
        called = not (name.endswith("attn.qkv") and family in ("EVA-02", "BEiT"))
        module = whole.get_submodule(name if called else name.removesuffix(".qkv"))
        module.register_forward_pre_hook(lambda m, a, name=name: hook(m, a, name))
    with torch.no_grad():
        for row in rows:
            whole(row["pixel_values"])
    assert set(expected) == set(seen)
    for name, squares in seen.items():
        torch.testing.assert_close(squares, expected[name], msg=name)


def test_layer_scope_compares_the_whole_layer():
    family = "DeiT, distilled"
    model, rows = tiny(family), samples(family)
    _, rowwise = reference.prune(model, "wanda", rows, kind=reference.TimmModel)
    result = pruneforge.prune(model, "wanda", 0.5, None, batched(rows), options={"scope": "layer"})
    for name, mask in result.masks.items():
        assert int((~mask).sum()) == mask.numel() // 2, name
    assert any(len(set((~mask).sum(1).tolist())) > 1 for mask in result.masks.values())
    assert any(not torch.equal(result.masks[name], rowwise[name]) for name in rowwise)


@pytest.mark.parametrize("family", ["DeiT, distilled", "ViT with registers (DINOv2)"])
def test_prefix_tokens_can_be_left_out(family):
    model, rows = tiny(family), samples(family)
    skipped = [{**row, "skip": model.num_prefix_tokens} for row in rows]
    _, expected = reference.prune(model, "wanda", skipped, kind=reference.TimmModel)
    _, default = reference.prune(model, "wanda", rows, kind=reference.TimmModel)
    result = pruneforge.prune(model, "wanda", 0.5, None, batched(rows), adapter_options={"prefix_tokens": False})
    assert all(torch.equal(result.masks[name], expected[name]) for name in expected)
    assert any(not torch.equal(result.masks[name], default[name]) for name in default)
    swin = tiny("Swin")
    with pytest.raises(PruneForgeError, match="no prefix tokens to leave out"):
        pruneforge.prune(swin, "wanda", 0.5, None, batched(rows), adapter_options={"prefix_tokens": False})


def test_without_labels_the_models_own_prediction_is_the_target():
    family = "DeiT, distilled"
    model = tiny(family)
    rows = [{"pixel_values": row["pixel_values"]} for row in samples(family)]
    _, expected = reference.prune(model, "gblm", rows, kind=reference.TimmModel)
    result = pruneforge.prune(copy.deepcopy(model), "gblm", 0.5, None, batched(rows))
    assert all(torch.equal(result.masks[name], expected[name]) for name in expected)
    assert result.report["calibration"]["loss"] == "cross-entropy of the model's own prediction"
    labelled = pruneforge.prune(model, "gblm", 0.5, None, batched(samples(family)))
    assert labelled.report["calibration"]["loss"] == "cross-entropy of the label"


def test_a_local_folder_is_pruned_and_written_back_in_the_same_layout(tmp_path):
    from timm.models import save_for_hf

    model = tiny("DeiT, distilled", torch.float32)
    save_for_hf(model, str(tmp_path / "in"), safe_serialization=True)
    pruneforge.prune(tmp_path / "in", "magnitude", 0.5, output=tmp_path / "out")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert first["architecture"] == second["architecture"]
    assert first["model_args"] == second["model_args"]
    assert first["pretrained_cfg"] == second["pretrained_cfg"]


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (torch.rand(2, 3, 32, 40), "images are 32x40, and the model takes 32x32"),
        (torch.rand(2, 1, 32, 32), "have 1 channels, and the model takes 3"),
        (torch.rand(2, 3, 32), "float [samples, channels, height, width]"),
        (torch.ones(2, 3, 32, 32).byte(), "got torch.uint8"),
        ({"pixel_values": torch.rand(1, 3, 32, 32), "labels": torch.tensor([7])}, "the head has 7 classes"),
    ],
)
def test_images_that_do_not_fit_are_named(pixels, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny("ViT"), "wanda", 0.5, None, [pixels])
    assert said in str(error.value)


def test_a_size_that_patches_do_not_divide_is_named():
    with pytest.raises(PruneForgeError, match="which patches of 8x8 do not divide"):
        pruneforge.prune(tiny("ViT, dynamic image size"), "wanda", 0.5, None, [torch.rand(1, 3, 36, 32)])


def test_a_head_that_does_not_fit_the_weights_is_named(tmp_path):
    from timm.models import save_for_hf

    save_for_hf(tiny("DeiT", torch.float32), str(tmp_path / "in"), safe_serialization=True)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["num_classes"] = 5  # timm would drop the head's weights in silence
    config["model_args"].pop("num_classes", None)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PruneForgeError, match=r"head\.weight.*\[7, 32\].*\[5, 32\]"):
        pruneforge.prune(tmp_path / "in", "magnitude", 0.5)
    (tmp_path / "in" / "config.json").write_text('{"architecture": "deit_')
    with pytest.raises(PruneForgeError, match="no adapter takes"):
        pruneforge.prune(tmp_path / "in", "magnitude", 0.5)


def test_models_whose_blocks_are_no_chain_are_refused():
    torch.manual_seed(0)
    for name, size in (("tnt_s_patch16_224", 224), ("crossvit_tiny_240", 240)):
        model = timm.create_model(name, num_classes=3).eval()
        with pytest.raises(PruneForgeError, match="blocks must form a chain"):
            pruneforge.prune(model, "wanda", 0.5, None, [torch.rand(1, 3, size, size)])


def test_a_block_that_is_not_given_hidden_states_is_named():
    class Wrong(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x=None):
            return self.block(x)

    class Blocks(torch.nn.Sequential):
        def forward(self, x):
            for block in self:
                x = block(x=x)  # a name that no library uses
            return x

    model = tiny("ViT")
    model.blocks = Blocks(*(Wrong(block) for block in model.blocks))
    with pytest.raises(PruneForgeError, match="is called with NoneType first, not with hidden states"):
        pruneforge.prune(model, "wanda", 0.5, None, [torch.rand(1, 3, 32, 32)])


@pytest.mark.parametrize(
    ("reference_", "said"),
    [
        ("timm:vit_tinny_patch16_224", "timm has no model"),
        ("timm:resnet18", "timm: ResNet has no blocks"),
        ("hf-hub:nobody/nothing", "no adapter takes 'hf-hub:nobody/nothing'"),
        ("timm:efficientnet_b0", "has batch normalisation"),
    ],
)
def test_names_that_do_not_work_are_declined_with_a_reason(reference_, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(reference_, "magnitude", 0.5)
    assert said in str(error.value)
