"""Published numbers: read from plugins' files, and found for cells of the same protocol alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from pruneforge import PruneForgeError, Registry
from pruneforge.plugins import loaded_plugins
from pruneforge.studies.plan import cells_of
from pruneforge.studies.published import published_dense, published_for, published_numbers
from pruneforge.studies.study import make_study

FILE = {
    "models": {"Demo": ["hub:somebody/demo", "text"], "Other": ["somebody/other"]},
    "tables": [
        {
            "source": "A paper, table 1",
            "task": "perplexity",
            "measure": "perplexity",
            "data": "python-docs",
            "window": 64,
            "recipe": {"calibration": "python-docs", "samples": 64, "seqlen": 2048, "propagate": "pruned"},
            "values": {
                "Demo": {
                    "dense": {0: 5.0},
                    "wanda": {0.5: 6.5, "2:4": 7.5},
                    "owl + wanda + sparseswaps + ridge": {0.5: 6.25},
                },
                "Other": {"wanda": {0.5: 9.0}},
            },
        },
        {
            "source": "A later paper",
            "task": "perplexity",
            "measure": "perplexity",
            "data": "python-docs",
            "window": 64,
            "values": {"Demo": {"wanda": {0.5: 6.6, 0.6: 8.0}}},
        },
        {
            "source": "A paper of images",
            "task": "imagenet",
            "measure": "top1",
            "images": 50000,
            "values": {"Demo": {"dense": {0: 0.8}, "wanda": {0.5: 0.7}}},
        },
        {
            "source": "Hearsay",
            "second_hand": True,
            "task": "perplexity",
            "measure": "perplexity",
            "data": "python-docs",
            "window": 64,
            "values": {"Demo": {"wanda": {0.7: 20.0}}},
        },
    ],
}
EVALUATION = {"task": "perplexity", "measure": "perplexity", "window": 64, "data": {"source": "python-docs"}}


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The numbers above, and no others."""
    registry = loaded_plugins().registry
    monkeypatch.setitem(registry._files, "published", {})
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump(FILE))
    registry.published(file)
    return file


def the_cell(method, pattern=0.5, model="demo:text", **options):
    tasks = [{"task": task, "options": options} for task in ("perplexity", "imagenet")]
    values = {"model": model, "calibration": "python-docs", "samples": 64, "tasks": tasks}
    study = {"models": {"m": values}, "methods": {"one": method}, "patterns": [pattern], "propagate": "pruned"}
    return cells_of(make_study(study | {"controls": False}), [])[0]


def found(method, pattern=0.5, model="demo:text", evaluation=None, **options):
    number = published_for(the_cell(method, pattern, model, **options), {**EVALUATION, **(evaluation or {})})
    return number and (number.value, number.source)


def test_a_number_is_found_by_model_method_and_pattern(registered):
    assert found({"metric": "wanda"}) == (6.5, "A paper, table 1")  # the first of two
    assert found({"metric": "wanda"}, "2:4") == (7.5, "A paper, table 1")
    assert found({"metric": "wanda"}, 0.6) == (8.0, "A later paper")
    assert found({"metric": "wanda"}, 0.7) is None  # second hand
    assert found({"metric": "magnitude"}) is None
    for model in ("somebody/other", "mirror/other", "/models/Other/"):
        assert found({"metric": "wanda"}, model=model) == (9.0, "A paper, table 1")
    assert found({"metric": "wanda"}, model="somebody/another") is None


def test_a_method_is_the_names_of_its_parts_and_nothing_else(registered):
    parts = {"metric": "wanda", "allocator": "owl", "refine": "sparseswaps", "recover": "ridge"}
    assert found(parts) == (6.25, "A paper, table 1")
    for more in ({"options": {"scope": "layer"}}, {"recover": "ridge"}, {"allocator": "owl"}):
        assert found({"metric": "wanda", **more}) is None
    assert found({**parts, "allocator_options": {"lam": 0.1}}) is None


def test_a_number_of_another_protocol_is_none(registered):
    wanda = {"metric": "wanda"}
    for other in ({"window": 128}, {"data": {"source": "c4"}}, {"measure": "loss"}, {"task": "mine"}, {"data": {}}):
        assert found(wanda, evaluation=other) is None
    for more in ({"limit": 8}, {"num_fewshot": 5}, {"present_only": True}, {"source_options": {"split": "train"}}):
        assert found(wanda, **more) is None
    assert found(wanda, data="python-docs", window=64) == (6.5, "A paper, table 1")
    dense = published_dense(the_cell({"metric": "magnitude"}, "2:4"), EVALUATION)
    assert dense is not None
    assert (dense.value, dense.window, dense.pattern) == (5.0, 64, 0.0)
    assert published_dense(the_cell(wanda, limit=8), EVALUATION) is None


IMAGES = {"task": "imagenet", "measure": "top1", "window": None, "images": 50000, "data": {"source": "imagenet"}}


def test_accuracies_of_other_images_are_none(registered):
    wanda = {"metric": "wanda"}
    assert found(wanda, evaluation=IMAGES, workers=2, amp=True) == (0.7, "A paper of images")
    for images in (10000, 49999, None):
        assert found(wanda, evaluation={**IMAGES, "images": images}) is None
        assert published_dense(the_cell(wanda), {**IMAGES, "images": images}) is None
    for more in ({"real_labels": "real.json"}, {"present_only": True}):
        assert found(wanda, evaluation=IMAGES, **more) is None


@pytest.mark.parametrize(
    "saw",
    [
        {"samples": 1},
        {"seqlen": 128},
        {"propagate": "dense"},
        {"calibration": "c4"},
        {"source_options": {"column": "body"}},
        {"streams": {"other": "c4"}},
    ],
)
def test_a_method_that_saw_other_data_than_the_table_states_has_no_number_of_it(registered, saw):
    assert found({"metric": "wanda", **saw}, "2:4") is None
    of_later = (6.6, "A later paper")  # which does not state what calibration saw, beside one source of it
    assert found({"metric": "wanda", **saw}) == (None if {"source_options", "streams"} & saw.keys() else of_later)
    dense = published_dense(the_cell({"metric": "wanda", **saw}), EVALUATION)
    assert dense is not None
    assert dense.value == 5.0  # which sees none


def test_a_method_that_needs_no_data_has_its_number_whatever_the_table_states(registered):
    cell = the_cell({"metric": "wanda"})
    without = replace(cell, recipe=cell.recipe.model_copy(update={"calibration": None, "samples": 128}))
    number = published_for(without, EVALUATION)
    assert number is not None
    assert number.value == 6.5
    assert found({"metric": "wanda", "seqlen": 2048}) == (6.5, "A paper, table 1")  # as it is by default


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": {"None": {"wanda": {0.5: 1}}}}, "model 'None' is not among the models"),
        ({"values": {"Demo": {"wanda": {2: 1}}}}, "method 'wanda': sparsity 2.0 is outside"),
        ({"values": {"Demo": {"wanda": {0: 1}}}}, "method 'wanda' has the pattern 0.0"),
        ({"values": {"Demo": {"dense": {0.5: 1}}}}, "method 'dense' has the pattern 0.5"),
        ({"values": {"Demo": {"wanda": {0.5: "low"}}}}, r"tables\.0\.values\.Demo\.wanda\.0\.5"),
        ({"recipe": {"batch_size": 8}}, "recipe: 'batch_size' is not one of calibration, "),
        ({"windows": 64}, r"tables\.0\.windows: Extra inputs"),
    ],
)
def test_a_wrong_file_is_named_with_its_plugin(registered, change, said):
    registered.write_text(yaml.safe_dump({**FILE, "tables": [{**FILE["tables"][0], **change}]}))
    with pytest.raises(PruneForgeError, match=rf"published '.*' of plugin 'python': .*{said}"):
        published_numbers()


def test_a_file_that_is_missing_or_no_yaml_is_named(registered):
    registered.write_text("models: [")
    with pytest.raises(PruneForgeError, match="is not plain YAML"):
        published_numbers()
    registered.unlink()
    with pytest.raises(PruneForgeError, match=r"of plugin 'python' cannot be read from .*: FileNotFoundError"):
        published_numbers()


def test_files_are_registered_once_and_forgotten_with_their_plugin(tmp_path):
    registry = Registry()
    registry.plugin = "one"
    registry.study("first", "one_package:first.yaml")
    registry.published(tmp_path / "numbers.yaml")
    registry.plugin = "two"
    with pytest.raises(PruneForgeError, match="study 'first' of plugin 'two' is already registered by plugin 'one'"):
        registry.study("first", tmp_path / "second.yaml")
    registry.study("other", tmp_path / "other.yaml")
    with pytest.raises(PruneForgeError, match="unknown study 'frist'; did you mean 'first'"):
        registry.file("study", "frist")
    with pytest.raises(PruneForgeError, match="study 'first' of plugin 'one' cannot be read from one_package:first"):
        registry.file("study", "first").read()
    assert "cannot be read" in registry.file("study", "first").summary()
    (tmp_path / "other.yaml").write_text("# What it shows.\nmodels: {}\n")
    assert registry.file("study", "other").summary() == "What it shows."
    registry.drop("one")
    assert [file.name for file in registry.files("study")] == ["other"]
    assert registry.files("published") == []
