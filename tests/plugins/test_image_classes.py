"""Which class each image has: folders called by number, parts of ImageNet's classes, and files that say it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import pruneforge
from pruneforge import ImageProcessor, ImageSet, PruneForgeError
from pruneforge.data.images import class_indices
from pruneforge.interfaces.source import Request, create_source
from pruneforge.plugins import loaded_plugins

EACH = 3


def model(classes: int):
    torch.manual_seed(0)
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": classes}
    built = timm.create_model("vit_tiny_patch16_224", **tiny).eval()
    built.head.weight.data.normal_(std=1)  # a new head predicts the same of every image
    return built


def folders(root: Path, names) -> Path:
    """A folder of random images for each name."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(EACH):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def logits_of(module, root: Path) -> list[tuple[str, torch.Tensor]]:
    """The folder and the logits [classes] of each image, float64, in the order of their names."""
    config = timm.data.resolve_data_config({"input_size": (3, 16, 16)}, model=module)
    transform = timm.data.create_transform(**config, is_training=False)
    found = []
    for path in sorted(root.rglob("*.png"), key=lambda path: path.relative_to(root).as_posix()):
        with Image.open(path) as image, torch.no_grad():
            found.append((path.parent.name, module(transform(image)[None])[0].double()))
    return found


def evaluate(module, data, **more):
    return pruneforge.evaluate(module, "imagenet", data=data, workers=0, items=True, **more)


def test_folders_that_are_called_by_number_are_the_classes_of_these_numbers(tmp_path):
    """As in ImageNet-V2, where "10" comes before "2" in the order of text."""
    module, names = model(12), [str(number) for number in range(12)]
    data = folders(tmp_path / "images", names)
    found = evaluate(module, data)
    right = [int(logits.argmax()) == int(name) for name, logits in logits_of(module, data)]
    assert found["items"]["top1"] == right
    by_text = [int(logits.argmax()) == sorted(names).index(name) for name, logits in logits_of(module, data)]
    assert right != by_text
    part = evaluate(module, folders(tmp_path / "part", ["3", "007", "10"]))
    losses = [float(logits.logsumexp(0) - logits[int(name)]) for name, logits in logits_of(module, tmp_path / "part")]
    assert part["items"]["loss"] == pytest.approx(losses, rel=1e-4)
    with pytest.raises(PruneForgeError, match=r"the images have a class 12, and the head has 0 to 11; .*classes=FILE"):
        evaluate(module, folders(tmp_path / "far", ["1", "12"]))


def test_the_choice_can_be_among_the_classes_that_occur(tmp_path):
    """As in ImageNet-R and ImageNet-A, whose folders are a part of the classes, by WordNet id."""
    module, info = model(1000), ImageNetInfo().label_names()
    present = [4, 77, 200, 281, 600, 999]
    data = folders(tmp_path / "images", [info[index] for index in present])
    found, plain = evaluate(module, data, present_only=True), evaluate(module, data)
    expected = []
    for name, logits in logits_of(module, data):
        among, truth = logits[present], present.index(info.index(name))
        five = among.argsort(descending=True)[:5].tolist()
        expected.append((int(five[0] == truth), int(truth in five), float(among.logsumexp(0) - among[truth])))
    assert found["items"]["top1"] == [top1 for top1, _, _ in expected]
    assert found["items"]["top5"] == [top5 for _, top5, _ in expected]
    assert found["items"]["loss"] == pytest.approx([loss for _, _, loss in expected], rel=1e-4)
    assert (found["classes"], plain["classes"]) == (6, 1000)
    assert found["top1"] > plain["top1"]
    assert {pair["taken_for"] for pair in found["confused"]} <= {info[index] for index in present}
    assert evaluate(module, data, present_only=True, limit=3)["classes"] == 6
    few = evaluate(module, folders(tmp_path / "few", [info[5], info[6]]), present_only=True)
    assert few["top5"] == 1.0


def test_a_file_says_which_folder_is_which_class(tmp_path):
    module, info = model(1000), ImageNetInfo().label_names()
    data = folders(tmp_path / "images", ["cats", "dogs", "0"])
    file = tmp_path / "classes.json"
    meant = {"cats": 281, "dogs": 207, "0": 9, "not there": 1}
    file.write_text(json.dumps({**meant, "dogs": info[207]}))
    asked = {"classes": str(file)}
    found = evaluate(module, data, source_options=asked)
    losses = [float(logits.logsumexp(0) - logits[meant[name]]) for name, logits in logits_of(module, data)]
    assert found["items"]["loss"] == pytest.approx(losses, rel=1e-4)
    registry = loaded_plugins().registry
    processor = registry.create("adapter", "timm").processor(module)
    source = create_source(data, asked, registry)
    drawn = [batch["labels"] for batch in source.calibration(Request(processor, 9, None, 4, 0))]
    assert sorted(torch.cat(drawn).tolist()) == [9] * 3 + [207] * 3 + [281] * 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"dogs": 3}, "the images have a class 'cats', which the file of classes does not name"),
        (
            {"cats": "n00000000", "dogs": 3},
            "class 'cats' is 'n00000000' by the file of classes, which names no one class",
        ),
        ({"cats": 1000, "dogs": 3}, "class 'cats' is 1000 by the file of classes, and the head has 0 to 999"),
        ({"cats": True, "dogs": 3}, "must map each name to the index or the name of a class"),
        (["cats", "dogs"], "must map each name to the index or the name of a class"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, content, said):
    data, file = folders(tmp_path / "images", ["cats", "dogs"]), tmp_path / "classes.json"
    if content is not None:
        file.write_text(json.dumps(content))
    with pytest.raises(PruneForgeError, match=said):
        evaluate(model(1000), data, source_options={"classes": str(file)})


class Named(ImageSet):
    """Nothing but labels."""

    def __init__(self, labels, class_names=None):
        self.labels, self.class_names = labels, class_names

    def __len__(self):
        return len(self.labels)

    def open(self, index):
        raise NotImplementedError

    def name(self, index):
        return str(index)

    def label(self, index):
        return self.labels[index]


def classes(labels, heads, class_names=None, mapping=None):
    count, names = (heads, None) if isinstance(heads, int) else (len(heads), heads)
    return class_indices(Named(labels, class_names), ImageProcessor(None, "RGB", count, names), mapping)


def test_names_of_the_head_come_before_numbers():
    assert classes(["1", "0"], ["1", "0"]) == [0, 1]
    assert classes(["2", "0"], ["a", "b", "c"]) == [2, 0]
    assert classes([0, 2, -1], 11, class_names=["0", "1", "10"]) == [0, 10, None]  # a data set of the Hub


def test_the_order_is_taken_only_if_asked_for():
    assert classes(["cats", "dog"], ["cats", "dog"]) == [0, 1]
    for labels, heads, strange in [
        (["b", "c", "a"], 3, "'a', 'b', 'c'; the head has 3 without names"),
        (["cats", "dog"], ["cat", "dog"], "'cats'; the head has 2, called like 'cat'"),
        (["dog", "hare"], ["hen", "dog"], "'hare'"),
        (["cat", "dog", "n1"], ["cat", "dog", "x", "y"], "'n1'"),
        (["cats", "dogs"], ["LABEL_0", "LABEL_1"], "'cats', 'dogs'"),
    ]:
        with pytest.raises(PruneForgeError) as error:
            classes(labels, heads)
        assert f"no class of the head by name, such as {strange}" in str(error.value)
        assert "classes=FILE, or classes=position" in str(error.value)
    assert classes(["b", "c", "a"], 3, mapping="position") == [1, 2, 0]
    assert classes(["cats", "dog"], ["cat", "dog"], mapping="position") == [0, 1]
    assert classes([0, 1, None], 2, class_names=["z", "a"], mapping="position") == [0, 1, None]
    with pytest.raises(PruneForgeError, match="2 classes and the head has 3, so position does not say"):
        classes(["a", "b"], 3, mapping="position")


def test_one_folder_that_is_called_differently_does_not_shift_the_others(tmp_path):
    module = model(4)
    module.pretrained_cfg = {**module.pretrained_cfg, "label_names": ["ant", "bee", "cat", "dog"]}
    data = folders(tmp_path / "images", ["ant", "bees", "cat", "zebra"])
    with pytest.raises(PruneForgeError, match="2 are no class of the head by name, such as 'bees', 'zebra'"):
        evaluate(module, data)
    source = create_source(data, {}, loaded_plugins().registry)
    processor = loaded_plugins().registry.create("adapter", "timm").processor(module)
    with pytest.raises(PruneForgeError, match="such as 'bees', 'zebra'"):  # calibration too
        list(source.calibration(Request(processor, 4, None, 4, 0)))
    found = evaluate(module, data, source_options={"classes": "position"})
    right = [
        int(logits.argmax()) == sorted(["ant", "bees", "cat", "zebra"]).index(name)
        for name, logits in logits_of(module, data)
    ]
    assert found["items"]["top1"] == right
    assert found["recipe"]["options"]["source_options"] == {"classes": "position"}


def test_imagenets_classes_go_by_id_or_by_description():
    info = ImageNetInfo()
    processor = loaded_plugins().registry.create("adapter", "timm").processor(model(1000))
    described = info.label_descriptions()
    for names in (info.label_names(), described):
        chosen = [names[index] for index in (7, 3, 999)]
        assert class_indices(Named(chosen), processor) == [7, 3, 999]
    twice = next(name for name in described if described.count(name) > 1)
    with pytest.raises(PruneForgeError, match="no class of the head by name"):
        class_indices(Named([described[0], twice]), processor)


def test_integers_are_mapped_too_and_a_name_of_two_classes_of_the_head_is_none():
    assert classes([5, 7, None], 3, mapping={"5": 2, "7": 0}) == [2, 0, None]
    with pytest.raises(PruneForgeError, match="'crane' by the file of classes, which names no one class"):
        classes(["bird"], ["crane", "crane"], mapping={"bird": "crane"})
