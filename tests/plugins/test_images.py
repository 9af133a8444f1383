"""Image sources and the ImageNet evaluator, on small images made here."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.data.images import class_indices, draw_order
from pruneforge.interfaces.source import Request, create_source
from pruneforge.plugins import loaded_plugins

CLASSES = ["cat", "dog", "owl"]
EACH = 8
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    """A random picture of a size that needs resizing and cropping."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed % 7, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """`val/CLASS/N.png`, one of them grey and one CMYK."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for number in range(EACH):
            mode = {(0, 1): "L", (1, 2): "CMYK"}.get((label, number), "RGB")
            suffix = "tif" if mode == "CMYK" else "png"
            picture(label * 100 + number, mode).save(tmp_path / "images" / "val" / name / f"{number}.{suffix}")
    return tmp_path / "images"


def model(classes: int = 3):
    torch.manual_seed(0)
    made = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=classes, **TINY).eval()
    if classes == len(CLASSES):
        made.pretrained_cfg = {**made.pretrained_cfg, "label_names": CLASSES}
    return made


@pytest.fixture
def checkpoint(tmp_path):
    save_for_hf(model(), str(tmp_path / "model"), {"label_names": CLASSES}, safe_serialization=True)
    return tmp_path / "model"


def source(data, **options):
    return create_source(data, options, loaded_plugins().registry)


def processor(module=None):
    return loaded_plugins().registry.create("adapter", "timm").processor(module or model())


def draw(data, samples=6, seed=0, module=None, **options):
    found = source(data, **options)
    batches = list(found.calibration(Request(processor(module), samples, None, 4, seed)))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}, found


def test_folder_zip_tar_and_hub_give_the_same_images(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    for name, mode in (("images.tar", "w"), ("images.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(folder, ".")
    names = ("images", "images.zip", "images.tar", "images.tar.gz")
    drawn = [draw(tmp_path / name, EACH * 3)[0] for name in names]
    for other in drawn[1:]:
        assert torch.equal(drawn[0]["pixel_values"], other["pixel_values"])
        assert torch.equal(drawn[0]["labels"], other["labels"])
    options = {"calibration_split": "validation"}
    streamed, _ = draw(f"imagenet:{folder}", EACH * 3, **options)
    totals = [sorted(d["pixel_values"].sum((1, 2, 3)).tolist()) for d in (drawn[0], streamed)]
    assert totals[0] == pytest.approx(totals[1])
    assert sorted(streamed["labels"].tolist()) == sorted(drawn[0]["labels"].tolist())


def test_preprocessing_is_the_checkpoints_own(folder):
    drawn, found = draw(folder, EACH * 3)
    module = model()
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=module)
    transform = timm.data.create_transform(**config, is_training=False)
    images = found.images("calibration")
    expected = [transform(images.open(index).convert("RGB")) for index in draw_order(images, 0, False)]
    assert torch.equal(drawn["pixel_values"], torch.stack(expected))
    assert drawn["pixel_values"].shape[2:] == (32, 32)


def test_drawing_is_without_replacement_seeded_and_balanced_on_request(folder):
    for name in ("cat", "dog"):
        for number in range(5):
            (folder / "val" / name / f"{number}.png").unlink(missing_ok=True)
    first, second, third = draw(folder, 9)[0], draw(folder, 9)[0], draw(folder, 9, seed=1)[0]
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["pixel_values"], third["pixel_values"])
    assert len({tuple(image.flatten()[:20].tolist()) for image in first["pixel_values"]}) == 9
    balanced, _ = draw(folder, 9, balanced=True)
    assert sorted(balanced["labels"].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_corrupt_image_is_named_and_counted_or_fails_a_strict_run(folder, checkpoint, tmp_path):
    good = (folder / "val" / "owl" / "3.png").read_bytes()
    (folder / "val" / "owl" / "3.png").write_bytes(good[: len(good) // 2])
    (folder / "val" / "dog" / "1.png").write_bytes(b"no image at all")
    result = pruneforge.prune(checkpoint, "wanda", 0.5, None, folder, samples=EACH * 3 - 2, dtype="float32")
    assert len(result.report["warnings"]) == 3
    assert "2 corrupt images were left out" in result.report["warnings"][0]
    assert "val/owl/3.png" in result.report["warnings"][0]
    found = pruneforge.evaluate(result, "imagenet", data=folder, options={"workers": 0})
    assert (found["images"], found["skipped"]) == (EACH * 3 - 2, 2)
    assert "val/dog/1.png" in found["warnings"][0]
    for warnings in (result.report["warnings"], found["warnings"]):
        assert warnings[1:] == [
            "1 images were converted from colour mode CMYK to RGB: val/dog/2.tif",
            "1 images were converted from colour mode L to RGB: val/cat/1.png",
        ]
    with pytest.raises(PruneForgeError, match=r"image 'val/(owl/3|dog/1)\.png' is corrupt"):
        draw(folder, EACH * 3, strict=True)
    with pytest.raises(PruneForgeError, match="is corrupt"):
        pruneforge.evaluate(result, "imagenet", data=folder, source_options={"strict": True}, options={"workers": 1})
    with pytest.raises(PruneForgeError, match="has 22 readable images and 24 were asked for"):
        draw(folder, EACH * 3)


def test_images_without_a_label_among_others_are_counted(folder):
    _, found = draw(folder, 4)
    assert not [text for text in found.warnings() if "label" in text]
    picture(7).save(folder / "loose.png")
    found = source(folder)
    total = len(CLASSES) * EACH + 1
    batches = list(found.calibration(Request(processor(), total, None, 4, 0)))
    assert sum("labels" not in batch for batch in batches) == 1
    assert "1 images have no label, so their batches count as without labels" in found.warnings()


def test_a_member_that_unpacks_to_far_more_than_an_image_is_not_read(folder, tmp_path, monkeypatch):
    from pruneforge_images import files

    for name, mode in (("images.zip", "zip"), ("images.tar", "w")):
        if mode == "zip":
            with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{CLASSES[0]}/large.png", bytes(1 << 20))
        else:
            with tarfile.open(tmp_path / name, mode) as archive:
                member = tarfile.TarInfo(f"{CLASSES[0]}/large.png")
                member.size = 1 << 20
                archive.addfile(member, io.BytesIO(bytes(1 << 20)))
        monkeypatch.setattr(files, "LARGEST", 1 << 19)
        with pytest.raises(OSError, match="it has 1,048,576 bytes, and 524,288 are the most"):
            source(tmp_path / name).images("evaluation").open(0)


def test_a_corrupt_member_of_an_archive_is_left_out_and_counted(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
        info = archive.getinfo("val/owl/3.png")
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[info.header_offset + 200] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(bytes(data))
    drawn, found = draw(tmp_path / "images.zip", EACH * 3 - 1)
    assert len(drawn["labels"]) == EACH * 3 - 1
    assert found.reading.corrupt in ([], ["val/owl/3.png"])  # empty if it is the one image not drawn
    with pytest.raises(PruneForgeError, match=r"image 'val/owl/3\.png' is corrupt"):
        draw(tmp_path / "images.zip", EACH * 3, strict=True)


def test_accuracy_is_the_plain_computation(folder, checkpoint):
    found = pruneforge.evaluate(checkpoint, "imagenet", data=folder, batch_size=5, options={"workers": 1})
    module, transform = model(), processor().transform
    right = {name: [] for name in CLASSES}
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / "val" / name).iterdir()):
            with Image.open(path) as image, torch.no_grad():
                logits = module(transform(image.convert("RGB"))[None])[0]
            right[name].append(int(logits.argmax()) == label)
    everything = [value for values in right.values() for value in values]
    assert found["top1"] == pytest.approx(sum(everything) / len(everything))
    assert found["top5"] == 1.0
    assert found["images"] == EACH * 3
    share, total = found["top1"], len(everything)
    low, high = found["top1_interval"]
    for bound in (low, high):  # Wilson: the bounds solve |share - p| = z * sqrt(p (1 - p) / n)
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / total), abs=1e-9)
    assert list(found["class_accuracy"].values()) == pytest.approx([sum(v) / len(v) for v in right.values()], abs=1e-6)
    assert sum(pair["images"] for pair in found["confused"]) == len(everything) - sum(everything)
    assert all(pair["class"] != pair["taken_for"] for pair in found["confused"])
    limited = pruneforge.evaluate(checkpoint, "imagenet", data=folder, limit=6, options={"workers": 0})
    assert limited["images"] == 6
    mixed = pruneforge.evaluate(checkpoint, "imagenet", data=folder, options={"workers": 0, "amp": True})
    assert mixed["images"] == EACH * 3


def test_each_image_has_a_record_by_name(folder, checkpoint, tmp_path):
    (folder / "val" / "dog" / "1.png").write_bytes(b"no image at all")
    found = pruneforge.evaluate(checkpoint, "imagenet", data=folder, options={"workers": 0}, items=True, batch_size=5)
    module, transform, expected = model(), processor().transform, []
    for path in sorted((folder / "val").rglob("*.*")):
        if path != folder / "val" / "dog" / "1.png":
            with Image.open(path) as image, torch.no_grad():
                logits = module(transform(image.convert("RGB"))[None])[0].double()
            truth = CLASSES.index(path.parent.name)
            row = (int(logits.argmax() == truth), 1, float(logits.logsumexp(0) - logits[truth]))
            expected.append((path.relative_to(folder).as_posix(), *row))
    items = found["items"]
    assert items["id"] == [row[0] for row in expected]
    assert items["top1"] == [row[1] for row in expected]
    assert items["top5"] == [row[2] for row in expected]
    assert items["loss"] == pytest.approx([row[3] for row in expected], rel=1e-4)
    assert sum(items["top1"]) / len(items["top1"]) == found["top1"]
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[0, 1, 2]] * (EACH * 3 - 1) + [[]]))
    options = {"workers": 0, "real_labels": str(real)}
    counted = pruneforge.evaluate(checkpoint, "imagenet", options, data=folder, items=True)
    assert len(counted["items"]["id"]) == counted["images"] == EACH * 3 - 2
    assert set(counted["items"]["top1"]) == {1}
    assert sum(counted["items"]["loss"]) / counted["images"] == pytest.approx(counted["loss"], rel=1e-12)


def test_images_that_are_called_alike_have_records_of_their_own(tmp_path, checkpoint):
    pictures = []
    for number, name in enumerate(("a.png", "b.png", "a.png")):
        picture(number).save(buffer := io.BytesIO(), "png")
        pictures.append({"bytes": buffer.getvalue(), "path": name})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2]}).cast_column("image", datasets.Image())
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "train.parquet")
    hub = {"evaluation_split": "train"}
    asked = {"data": f"imagenet:{tmp_path / 'rows'}", "source_options": hub, "workers": 0}
    found = pruneforge.evaluate(checkpoint, "imagenet", asked, items=True)
    assert found["items"]["id"] == ["a.png (0)", "b.png", "a.png (2)"]


def test_real_labels_count_every_right_class_and_leave_out_images_without(folder, checkpoint, tmp_path):
    plain = pruneforge.evaluate(checkpoint, "imagenet", data=folder, options={"workers": 0})
    everything_right = tmp_path / "real.json"
    everything_right.write_text(json.dumps([[0, 1, 2]] * (EACH * 3 - 1) + [[]]))
    found = pruneforge.evaluate(
        checkpoint, "imagenet", data=folder, options={"workers": 0, "real_labels": str(everything_right)}
    )
    assert found["top1"] == 1.0
    assert found["images"] == EACH * 3 - 1
    assert (plain["labels"], found["labels"]) == ("folder", "real")
    for content in ([0, 1, 2] * EACH, [[3]] * (EACH * 3)):
        everything_right.write_text(json.dumps(content))
        with pytest.raises(PruneForgeError, match="must be a list of classes from 0 to 2 for each image"):
            pruneforge.evaluate(checkpoint, "imagenet", data=folder, options={"real_labels": str(everything_right)})


def test_wordnet_folders_map_by_name_even_if_only_some_are_there(tmp_path):
    info = timm.data.ImageNetInfo("imagenet-1k").label_names()
    for name in ("n01440764", "n02123045", "n15075141"):
        (tmp_path / "in" / name).mkdir(parents=True)
        picture(1).save(tmp_path / "in" / name / "0.png")
    found = source(tmp_path / "in").images("evaluation")
    labels = class_indices(found, processor(model(1000)))
    assert labels == [0, 281, 999]
    assert [info[index] for index in labels] == ["n01440764", "n02123045", "n15075141"]


def test_bad_images_are_named(folder, checkpoint, tmp_path):
    def fails(data, said, **options):
        with pytest.raises(PruneForgeError) as error:
            draw(data, **options)
        assert said in str(error.value)

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no images")
    fails(folder, "holds no images below a folder 'train'", split="train")
    fails(folder, "has 24 readable images and 100 were asked for", samples=100)
    fails(
        folder,
        "of which 3 are no class of the head by name, such as 'cat', 'dog', 'owl'; the head has 5",
        module=model(5),
    )
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    fails(tmp_path / "broken.zip", "cannot be read")
    fails("imagenet:nobody/nothing", "cannot be loaded")
    with pytest.raises(PruneForgeError, match="the model does not take images"):
        list(source(folder).calibration(Request(None, 1, None, 1, 0)))
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    picture(0).save(one / "cat" / "0.png")
    fails(one, "has 1 readable images and 6 were asked for")  # a part of the classes will do
    (one / "cat").rename(one / "lion")
    fails(one, "the images have 1 classes, of which 1 are no class of the head by name, such as 'lion'")
    with pytest.raises(PruneForgeError, match="images without a class; put each class in a folder"):
        pruneforge.evaluate(checkpoint, "imagenet", data=one / "lion", options={"workers": 0})
    (tmp_path / "both").mkdir()
    for split in ("train", "val"):
        shutil.copytree(folder / "val", tmp_path / "both" / split)
    fails(tmp_path / "both", "holds class 'cat' twice")
    assert len(draw(tmp_path / "both", split="train")[0]["labels"]) == 6
    with pytest.raises(PruneForgeError, match="source 'python-docs' gives none"):
        pruneforge.evaluate(checkpoint, "imagenet", data="python-docs")
    with pytest.raises(PruneForgeError, match="gives text"):
        pruneforge.prune(checkpoint, "wanda", 0.5, None, "python-docs", samples=2)


def test_dataset_rows_without_labels_have_none(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [picture(i) for i in range(3)]}).cast_column("image", datasets.Image())
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "train.parquet")
    drawn, _ = draw(f"imagenet:{tmp_path / 'rows'}", 3)
    assert set(drawn) == {"pixel_values"}


def test_rows_of_an_unlabelled_part_have_no_class(tmp_path):
    """Hub data sets give every image of such a part the label -1."""
    label = datasets.ClassLabel(names=["cat", "dog", "owl"])
    rows = datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(3)], "label": [-1, 0, 2]},
        features=datasets.Features({"image": datasets.Image(), "label": label}),
    )
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "train.parquet")
    images = source(f"imagenet:{tmp_path / 'rows'}").images("calibration")
    classes = class_indices(images, processor(model(3)))
    assert {images.label(index): of_image for index, of_image in enumerate(classes)} == {-1: None, 0: 0, 2: 2}


def test_class_names_of_a_data_set_must_be_the_heads(folder, tmp_path):
    path = f"imagenet:{folder}"
    with pytest.raises(
        PruneForgeError, match="3 are no class of the head by name, such as 'cat', 'dog', 'owl'; the head has 5"
    ):
        draw(path, module=model(5), calibration_split="validation")
    images = source(path).images("evaluation")
    module = model(5)
    module.pretrained_cfg["label_names"] = ["owl", "hen", "cat", "elk", "dog"]
    expected = {"cat": 2, "dog": 4, "owl": 0}
    labels = class_indices(images, processor(module))
    assert labels == [expected[images.class_names[images.label(index)]] for index in range(len(images))]
    assert set(labels) == {0, 2, 4}


def test_an_evaluation_split_can_be_read_in_part(folder):
    images = source(f"imagenet:{folder}", evaluation_pool=5).images("evaluation")
    assert len(images) == 5


def test_reading_processes_change_nothing(folder, checkpoint):
    alone, several = (
        pruneforge.evaluate(checkpoint, "imagenet", data=folder, options={"workers": workers}, batch_size=4)
        for workers in (0, 2)
    )
    changing = {"images_per_second", "seconds", "recipe", "machine", "measured"}
    assert {k: v for k, v in alone.items() if k not in changing} == {
        k: v for k, v in several.items() if k not in changing
    }


def test_imagenet_samples_are_preprocessed_as_timm_does_pixel_for_pixel(shared_data):
    module = timm.create_model("deit_tiny_patch16_224").eval()
    chosen = source(shared_data / "imagenet-samples.zip")
    images, mine = chosen.images("evaluation"), processor(module)
    assert len(images) == 1000
    assert sorted(class_indices(images, mine)) == list(range(1000))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    for index in range(0, 1000, 20):
        image = images.open(index).convert("RGB")
        assert torch.equal(mine.transform(image), transform(image))
