"""Published numbers and shipped studies: the numbers are the papers', and every study can run as it is."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from pruneforge.plugins import loaded_plugins
from pruneforge.runs.job import make_job
from pruneforge.studies.cells import arguments
from pruneforge.studies.plan import cells_of
from pruneforge.studies.published import published_dense, published_for, published_numbers
from pruneforge.studies.run import check
from pruneforge.studies.study import Study, make_study
from pruneforge_papers import FROM_THE_HUB, LOCAL, OFFLINE


def numbers(source=""):
    return {
        (number.model, number.method, number.pattern, number.window): number.value
        for number in published_numbers()
        if source in number.source
    }


def test_every_number_is_there_once_and_says_where_it_is_from():
    found = published_numbers()
    keys = Counter((n.model, n.method, n.pattern, n.task, n.data, n.window, n.source) for n in found)
    assert max(keys.values()) == 1
    assert len(found) == 142
    assert all(number.source and number.references and number.value > 0 for number in found)
    assert all((number.window is not None) == (number.measure == "perplexity") for number in found)
    assert all(number.value < 1 for number in found if number.measure != "perplexity")
    assert all(number.method == number.method.lower() for number in found)


def test_numbers_are_those_of_the_tables():
    beyond_size, simple = numbers("Beyond Size"), numbers("A Simple and Effective")
    assert len(beyond_size) == 30
    assert beyond_size["LLaMA-1 7B", "dense", 0.0, 2048] == 5.68
    assert beyond_size["LLaMA-1 13B", "magnitude", 0.5, 2048] == 20.21
    assert beyond_size["LLaMA-1 30B", "wanda", 0.5, 2048] == 5.24
    assert beyond_size["LLaMA-2 7B", "gblm", 0.5, 2048] == 6.86
    assert beyond_size["LLaMA-2 70B", "sparsegpt", 0.5, 2048] == 4.25
    assert len(simple) == 18 + 4
    assert simple["LLaMA-2 7B", "magnitude", "2:4", 4096] == 54.59
    assert simple["LLaMA-2 13B", "wanda", "4:8", 4096] == 6.55
    assert simple["LLaMA-1 7B", "sparsegpt", 0.5, None] == 0.5494
    assert numbers("MaskLLM-4V")["ViT-B/16", "sparsegpt", "2:4", None] == 0.7152
    assert numbers("ALPS")["LLaMA-2 7B", "alps", 0.7, 2048] == 19.3
    assert numbers("ALPS")["LLaMA-3 8B", "dsnot", "4:8", 2048] == 14.8
    assert numbers("D2Prune")["LLaMA-2 7B", "pruner-zero", 0.7, 4096] == 151.9
    assert numbers("RIA")["LLaMA-3 8B", "ria + permutation", "2:4", 2048] == 20.05


def test_gradients_help_in_every_model_of_their_paper():
    found = numbers("Beyond Size")
    for model in {model for model, *_ in found}:
        others = [found[model, method, 0.5, 2048] for method in ("magnitude", "sparsegpt", "wanda")]
        assert found[model, "dense", 0.0, 2048] < found[model, "gblm", 0.5, 2048] < min(others)


def cell(model, method="wanda", pattern: float | str = 0.5, **saw):
    of_model = {"model": model, "calibration": "c4", "tasks": [{"task": "perplexity"}], **saw}
    values = {"models": {"m": of_model}, "methods": {"one": {"metric": method}}, "patterns": [pattern]}
    values["propagate"] = "pruned"
    return cells_of(make_study(values | {"controls": False}), [])[0]


@pytest.mark.parametrize(
    ("model", "window", "found", "dense"),
    [
        ("meta-llama/Llama-2-7b-hf", 2048, 6.92, 5.47),
        ("checkpoints/llama-2-7b-hf", 4096, 6.42, None),
        ("meta-llama/Llama-2-70b-hf", 4096, None, None),
        ("meta-llama/Llama-2-7b-chat-hf", 2048, None, None),
    ],
)
def test_perplexities_of_wikitext_are_found_by_window(model, window, found, dense):
    evaluation = {"task": "perplexity", "measure": "perplexity", "window": window, "data": {"source": "wikitext2"}}
    as_published = cell(model, seqlen=window)
    pruned, whole = published_for(as_published, evaluation), published_dense(as_published, evaluation)
    assert (pruned and pruned.value) == found
    assert (whole and whole.value) == dense
    assert published_for(as_published, {**evaluation, "data": {"source": "c4"}}) is None


def test_a_perplexity_after_other_calibration_is_not_the_published_one():
    """Those of LLaMA-2 7B at 50 % state theirs; one sample in place of 128 gives another model."""
    evaluation = {"task": "perplexity", "measure": "perplexity", "window": 2048, "data": {"source": "wikitext2"}}
    for saw in ({"samples": 1}, {"seqlen": 512}, {"calibration": "wikitext2"}):
        assert published_for(cell("meta-llama/Llama-2-7b-hf", **saw), evaluation) is None


@pytest.mark.parametrize("prefix", ["timm:", "hf-hub:timm/"])
def test_accuracies_are_found_by_the_name_in_timm(prefix):
    evaluation = {"task": "imagenet", "measure": "top1", "images": 50000, "data": {"source": "imagenet/val"}}
    found = published_for(cell(f"{prefix}vit_base_patch16_224.augreg_in1k", "magnitude", "2:4"), evaluation)
    assert found is not None
    assert found.value == 0.6592
    assert published_for(cell(f"{prefix}vit_base_patch16_224.augreg2_in21k_ft_in1k"), evaluation) is None
    matched = {**evaluation, "images": 10000, "data": {"source": "imagenetv2-matched-frequency"}}
    assert published_for(cell(f"{prefix}vit_base_patch16_224.augreg_in1k", "magnitude", "2:4"), matched) is None


def shipped(name) -> Study:
    return make_study(yaml.safe_load(loaded_plugins().registry.file("study", name).read()), name)


@pytest.mark.parametrize("name", [*OFFLINE, *FROM_THE_HUB])
def test_a_study_names_only_what_there_is(name):
    study, registry = shipped(name), loaded_plugins().registry
    cells = cells_of(study, [])
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        make_job(**arguments(cell))
        for task in cell.tasks:
            registry.create("evaluator", task.task, task.options)
    assert registry.file("study", name).summary().endswith(".")


@pytest.mark.parametrize("name", OFFLINE)
def test_a_study_of_the_demo_can_run_without_a_network(name):
    study = shipped(name)
    assert {model.model for model in study.models.values()} == {"demo:text", "demo:image"}
    check(study, cells_of(study, []))


@pytest.mark.parametrize("name", LOCAL)
def test_a_study_of_folders_asks_for_what_can_run(name):
    """With the demo's models and data in the place of the folders."""
    values = yaml.safe_load(loaded_plugins().registry.file("study", name).read())
    for model in values["models"].values():
        image = "imagenet" in {task["task"] for task in model["tasks"]}
        model["model"], model["calibration"] = ("demo:image", "digits") if image else ("demo:text", "python-docs")
        model.pop("source_options", None)
        for task in model["tasks"]:
            task["options"]["data"] = "digits" if image else "python-docs"
    study = make_study(values, name)
    cells = cells_of(study, [])
    assert len({cell.key for cell in cells}) == len(cells)
    check(study, cells)
    assert loaded_plugins().registry.file("study", name).summary().endswith(".")


def test_statistics_of_image_classifiers_are_of_the_models_that_the_published_ones_are_of():
    """Wanda's from one pass over the dense model, the others' from blocks behind pruned ones."""
    propagate = {cell.method: cell.recipe.propagate for cell in cells_of(shipped("vit-table"), [])}
    assert propagate == {"magnitude": "pruned", "sparsegpt": "pruned", "wanda": "dense", "gblm": "pruned"}


def test_image_classifiers_are_those_of_timm():
    import timm

    models = [model.model.removeprefix("timm:") for model in shipped("vit-table").models.values()]
    assert set(models) <= set(timm.list_pretrained())


@pytest.mark.parametrize(("name", "cells", "dense"), [("gblm-table1", 16, 4), ("wanda-table", 18, 0)])
def test_each_cell_of_a_table_has_its_published_number(name, cells, dense):
    """As the evaluation says what it measured, which needs no model to know."""
    found = []
    for cell in cells_of(shipped(name), []):
        (task,) = cell.tasks
        evaluation = {"task": task.task, "measure": "perplexity", "window": task.options["window"]}
        evaluation["data"] = {"source": task.options["data"]}
        assert cell.recipe.seqlen == task.options["window"]
        assert (cell.recipe.calibration, cell.recipe.samples, cell.recipe.propagate) == ("c4", 128, "pruned")
        found.append((cell.model, published_for(cell, evaluation), published_dense(cell, evaluation)))
    assert len(found) == cells
    assert all(number is not None and number.model == model for model, number, _ in found)
    assert len({model for model, _, whole in found if whole is not None}) == dense
