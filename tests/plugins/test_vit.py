"""transformers' image classifiers: masks as the reference makes them, their own layout in and out."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
import transformers
from timm.data import ImageNetInfo

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.loading import load_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
    "initializer_range": 0.1,
}

FAMILIES = {
    "ViT": (transformers.ViTConfig, transformers.ViTForImageClassification),
    "DeiT": (transformers.DeiTConfig, transformers.DeiTForImageClassification),
    "DeiT, distilled": (transformers.DeiTConfig, transformers.DeiTForImageClassificationWithTeacher),
}


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config, cls = FAMILIES[family]
    return cls(config(**SMALL)).double().eval()


def samples(count: int = 5) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return [{"pixel_values": image[None], "labels": torch.tensor([index % 7])} for index, image in enumerate(images)]


def batches() -> list[dict]:
    rows = samples()
    return [{key: torch.cat([row[key] for row in part]) for key in rows[0]} for part in (rows[:2], rows[2:])]


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "sparsegpt", "gblm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_the_reference(family, metric):
    model = tiny(family)
    _, expected = reference.prune(model, metric, samples(), kind=reference.TransformersImageModel)
    result = pruneforge.prune(copy.deepcopy(model), metric, 0.5, None, batches())
    assert list(result.masks) == list(expected)
    assert len(result.masks) == 2 * 6
    for name in expected:
        assert torch.equal(result.masks[name], expected[name]), name


def test_prefix_tokens_can_be_left_out():
    model = tiny("DeiT")
    rows = [{**row, "skip": 2} for row in samples()]
    _, expected = reference.prune(model, "wanda", rows, kind=reference.TransformersImageModel)
    result = pruneforge.prune(model, "wanda", 0.5, None, batches(), adapter_options={"prefix_tokens": False})
    assert all(torch.equal(result.masks[name], expected[name]) for name in expected)


def test_a_folder_is_pruned_and_written_back(tmp_path):
    model = tiny("ViT").float()
    model.save_pretrained(tmp_path / "in")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "in")
    result = pruneforge.prune(tmp_path / "in", "magnitude", 0.5, output=tmp_path / "out")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 32
    for name, mask in result.masks.items():
        assert torch.equal(again.get_submodule(name).weight != 0, mask)


def test_images_of_another_size_are_named():
    with pytest.raises(PruneForgeError, match="images are 3x40x32, and the model takes 3x32x32"):
        pruneforge.prune(tiny("ViT"), "wanda", 0.5, None, [torch.rand(1, 3, 40, 32)])


def processor_of(names, tmp_path):
    config = transformers.ViTConfig(**{**SMALL, "num_labels": 1000}, id2label=names)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return load_model(tmp_path, "auto", None, loaded_plugins().registry).processor


def test_an_imagenet_heads_classes_are_wordnet_ids(tmp_path):
    info = ImageNetInfo()
    names = {index: info.index_to_description(index) for index in range(1000)}
    assert processor_of(names, tmp_path).names[281] == "n02123045"  # tabby, tabby cat
    spelled = processor_of({**names, 3: "tiger shark"}, tmp_path)
    assert len(set(spelled.names)) == 1000
    assert spelled.names[3] == "n01491361"
    other = {**names, 281: names[282], 282: names[281]}  # a head in another order
    swapped = processor_of(other, tmp_path)
    assert list(swapped.names) == list(other.values())
    assert not swapped.aliases
