"""What goes wrong in a plugin is named, with the plugin and the layer, before anything is half written."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge import ColumnSquares, Metric, Pruned, PruneForgeError, Refiner
from pruneforge.interfaces.hookspecs import hookimpl
from pruneforge.plugins import Plugins, loaded_plugins

LAYER = "'model.layers.0.self_attn.q_proj'"


def scoring(score, **attributes):
    """A metric of this score function."""
    return type("Mine", (Metric,), {"requires": (ColumnSquares,), "score": staticmethod(score), **attributes})()


def pruning(prune_layer, **attributes):
    """A metric that prunes layers by this function."""
    return type("Mine", (Metric,), {"prune_layer": staticmethod(prune_layer), "scope": None, **attributes})()


def half(layer, stats, pattern):
    return Pruned(pattern.select(layer.weight.abs()))


def in_place(layer, stats):
    layer.weight.abs_()
    return layer.weight


def past_torchs_count(layer, stats):
    layer.parameter.data[0, 0] += 1
    return layer.weight.abs()


def by_places(layer, stats):
    layer.parameter.data.copy_(layer.parameter.data.flip(0, 1))
    return layer.weight.abs()


def statistic_in_place(layer, stats):
    return layer.weight.abs() * stats[ColumnSquares].total.sqrt_()


def leaves(layer, stats):
    sys.exit(3)


def fails(layer, stats):
    raise ValueError("no such\nthing")


WRONG = [
    (scoring(in_place), f"metric 'mine' changed the weight of layer {LAYER} in place"),
    (scoring(past_torchs_count), f"metric 'mine' changed the weight of layer {LAYER} in place"),
    (scoring(by_places), f"metric 'mine' changed the weight of layer {LAYER} in place"),
    (scoring(statistic_in_place), f"metric 'mine' changed statistic ColumnSquares of layer {LAYER} in place"),
    (scoring(fails), f"metric 'mine' failed on layer {LAYER}: ValueError: no such thing"),
    (scoring(leaves), f"metric 'mine' failed on layer {LAYER}: SystemExit: 3"),
    (scoring(lambda layer, stats: None), f"scored layer {LAYER} with NoneType; it must return a tensor"),
    (scoring(lambda layer, stats: layer.weight.tolist()), f"scored layer {LAYER} with list"),
    (scoring(lambda layer, stats: layer.weight.numpy()), f"scored layer {LAYER} with ndarray"),
    (scoring(lambda layer, stats: layer.weight.cfloat()), f"scored layer {LAYER} with torch.complex64"),
    (
        scoring(lambda layer, stats: layer.weight, scope="column"),
        "has the scope 'column'; it must be None or one of row",
    ),
    (pruning(lambda *_: Pruned(torch.ones(64, 64, dtype=torch.bool))), f"pruned 0.0% of layer {LAYER}, where 50.0%"),
    (pruning(lambda *_: torch.ones(64, 64)), f"returned Tensor for layer {LAYER}; it must return Pruned"),
    (
        pruning(lambda layer, stats, pattern: Pruned(half(layer, stats, pattern).mask, None, "one text")),
        "gave notes for layer",
    ),
    (
        pruning(lambda layer, stats, pattern: Pruned(half(layer, stats, pattern).mask, layer.weight[:, :3])),
        r"made weights of \(64, 3\)",
    ),
]


@pytest.mark.parametrize(("metric", "said"), WRONG, ids=[said[:50] for _, said in WRONG])
def test_a_mistake_of_a_metric_is_named_in_one_line(metric, said, tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(PruneForgeError, match=said) as error:
        pruneforge.prune(tmp_path / "model", metric, 0.5, None, tokens().split(3), output=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_the_models_dtype_are_refused():
    metric = pruning(lambda layer, stats, pattern: Pruned(half(layer, stats, pattern).mask, layer.weight * 1e6))
    with pytest.raises(PruneForgeError, match=f"weights in layer {LAYER} that are too large for torch.float16"):
        pruneforge.prune(tiny_llama(torch.float16), metric, 0.5)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_scopes_over_layers_need_scores(scope):
    with pytest.raises(
        PruneForgeError, match=f"scope={scope} compares scores of several layers, and metric 'mine' has no"
    ):
        pruneforge.prune(tiny_llama(), pruning(half, scope=scope), 0.5)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_refiner_may_not_change_what_a_layer_of_a_group_loses(scope):
    class Greedy(Refiner):
        def refine(self, layer, stats, pruned, pattern):
            mask = pruned.mask.clone()
            mask[0, 0] = ~mask[0, 0]
            return Pruned(mask)

    with pytest.raises(PruneForgeError, match=r"refiner 'greedy' made a mask for layer .* that does not fit"):
        pruneforge.prune(tiny_llama(), "magnitude", 0.5, options={"scope": scope}, refine=Greedy())


def test_pythons_and_numpys_random_numbers_are_seeded_and_given_back():
    def score(layer, stats):
        numbers = [random.random() for _ in range(layer.weight.numel())]
        return torch.tensor(numbers).view(layer.shape) + torch.from_numpy(np.random.rand(*layer.shape))

    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    first, second = (pruneforge.prune(tiny_llama(), scoring(score), 0.5, None, [tokens()]).masks for _ in range(2))
    assert all(torch.equal(first[name], mask) for name, mask in second.items())
    assert (random.random(), np.random.rand()) == expected


def test_a_plugin_file_may_import_a_helper_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_beside.py").write_text("POWER = 0.5\n")
    (tmp_path / "helped.py").write_text(
        "import helper_beside\nfrom pruneforge import Metric\n"
        "class Helped(Metric):\n"
        "    def score(self, layer, stats):\n"
        "        return layer.weight.abs() ** helper_beside.POWER\n"
    )
    plugins = Plugins()
    plugins.load_file(tmp_path / "helped.py")
    assert plugins.registry.create("metric", "helped").name == "helped"


def test_an_installed_plugin_called_like_its_distribution_is_no_file(tmp_path, monkeypatch):
    info = tmp_path / "samename-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: samename\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pruneforge]\nsamename = samename_plugin\n")
    (tmp_path / "samename_plugin.py").write_text(
        "from pruneforge import Metric\n"
        "class SameName(Metric):\n"
        "    def score(self, layer, stats):\n"
        "        return layer.weight.abs()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins = Plugins()
    plugins.load_installed("samename")
    assert [(plugin.name, plugin.from_file, plugin.error) for plugin in plugins.loaded] == [("samename", False, None)]


def test_a_plugin_that_was_edited_is_another_run(tmp_path, monkeypatch):
    file = tmp_path / "edited_metric.py"
    code = (
        "from pruneforge import Metric\nclass Edited(Metric):\n"
        "    def score(self, layer, stats):\n        return layer.weight.abs()\n"
    )
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import edited_metric

    class Interrupted:
        @hookimpl
        def pruneforge_block_pruned(self, result):
            raise KeyboardInterrupt

    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    asked = (tmp_path / "model", edited_metric.Edited(), 0.5)
    observer = Interrupted()
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune(*asked, output=tmp_path / "out")
    finally:
        loaded_plugins().unregister(observer)
    file.write_text(code + "# changed\n")
    with pytest.raises(PruneForgeError, match="is another one: plugin edited_metric was"):
        pruneforge.prune(*asked, output=tmp_path / "out", resume=True)
    file.write_text(code)
    report = pruneforge.prune(*asked, output=tmp_path / "out", resume=True).report
    assert set(report["plugins"]) == {"edited_metric", "pruneforge_llama", "pruneforge_transformers"}
    assert report["plugins"]["pruneforge_llama"]["distribution"] == "pruneforge-lab"
    assert json.loads((tmp_path / "out" / "pruneforge.json").read_text())["plugins"] == report["plugins"]


def test_gradient_statistics_made_by_an_option_have_their_own_files(tmp_path):
    def statistic(power):
        class Powers(pruneforge.GradientStatistic):
            def add(self, gradient):
                self.total += gradient.abs() ** power

        return Powers

    def score(kind):
        return lambda layer, stats: layer.weight.abs() * stats[kind].total

    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    masks = []
    for power in (1, 2):
        kind = statistic(power)
        metric = scoring(score(kind), requires=(kind,))
        for cache in ("shared", f"own{power}"):
            found = pruneforge.prune(
                tmp_path / "model",
                metric,
                0.5,
                None,
                tokens().split(3),
                output=tmp_path / f"{cache}{power}",
                gradient_cache=tmp_path / cache,
            )
            masks.append(found.masks)
    for shared, own in (masks[:2], masks[2:]):
        assert all(torch.equal(shared[name], mask) for name, mask in own.items())


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_metric_without_a_scope_of_its_own_may_be_given_one_over_layers(scope):
    """Then the layers' shares differ, which is no mistake."""

    def score(layer, stats):
        return layer.weight.abs() * (100 if layer.name.endswith("q_proj") else 1)

    metric = type("Mine", (Metric,), {"score": staticmethod(score), "scope": None})(scope=scope)
    masks = pruneforge.prune(tiny_llama(), metric, 0.5).masks
    assert masks["model.layers.0.self_attn.q_proj"].double().mean() > 0.9
    total, kept = (sum(counts) for counts in zip(*((m.numel(), int(m.sum())) for m in masks.values()), strict=True))
    assert kept == total - total // 2
