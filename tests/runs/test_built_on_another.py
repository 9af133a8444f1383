"""Methods that are built on another metric, by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import run_of, tiny_llama, tokens
from pydantic import Field

import pruneforge
from pruneforge import Allocator, Metric, Pruned, PruneForgeError, Refiner
from pruneforge.interfaces.hookspecs import hookimpl
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.provenance import plugin_sources
from pruneforge.testing import run_checks


class Options(Metric.Options):
    base: str = Field("wanda", description="metric that scores")


class Built:
    """Makes the metric that its option names."""

    def __init__(self, **options):
        super().__init__(**options)
        self.base = pruneforge.create("metric", self.options.base)
        self.requires = self.base.requires


class Squared(Built, Metric):
    Options = Options

    def score(self, layer, stats):
        return self.base.score(layer, stats.owned_by(self.base)) ** 2


class Twice(Metric):
    """Another metric's result at one set of options, computed after that at another set."""

    scope = None

    def __init__(self, **options):
        super().__init__(**options)
        self.both = [pruneforge.create("metric", "sparsegpt", damping=damping) for damping in (0.5, 0.01)]
        self.requires = self.both[0].requires

    def prune_layer(self, layer, stats, pattern):
        return [each.prune_layer(layer, stats.owned_by(each), pattern) for each in self.both][-1]


class Reselected(Built, Refiner):
    class Options(Refiner.Options):
        base: str = Field("wanda", description="metric that scores")

    def refine(self, layer, stats, pruned, pattern):
        return Pruned(pattern.select(self.base.score(layer, stats.owned_by(self.base))))


def allocated(measures, sparsity):
    means = {name: mean for of_block in measures.values() for name, mean in of_block.items()}
    largest = max(means.values())
    return {name: sparsity * (1 - 0.2 * mean / largest) for name, mean in means.items()}


class ByAnother(Built, Allocator):
    class Options(Allocator.Options):
        base: str = Field("wanda", description="metric that scores")

    def measure(self, block, stats, score):
        return {la.name: self.base.score(la, stats[la.name].owned_by(self.base)).mean().item() for la in block.layers}

    def allocate(self, measures, sizes, sparsity):
        return allocated(measures, sparsity)


class ByTheRuns(Allocator):
    uses_scores = True

    def measure(self, block, stats, score):
        return {layer.name: score(layer).mean().item() for layer in block.layers}

    def allocate(self, measures, sizes, sparsity):
        return allocated(measures, sparsity)


def masks(metric, *asked, **settings):
    settings = {"propagate": "dense", **settings}
    return pruneforge.prune(tiny_llama(), metric, *(asked or (0.5,)), calibration=tokens().split(3), **settings).masks


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_a_plugin_is_made_by_name_with_its_options():
    assert pruneforge.create("metric", "gblm", alpha="50").options.alpha == 50
    assert pruneforge.create("allocator", "file:shares.json").name == "file"
    for asked, options, said in (
        (("metric", "wandas"), {}, "did you mean 'wanda'"),
        (("metrics", "wanda"), {}, "unknown kind of plugin 'metrics'; did you mean 'metric'"),
        (("metric", "gblm"), {"alhpa": 1}, "did you mean 'alpha'"),
    ):
        with pytest.raises(PruneForgeError, match=said):
            pruneforge.create(*asked, **options)
    with pytest.raises(PruneForgeError, match="did you mean 'wanda'"):
        Squared(base="wandas")


@pytest.mark.parametrize("base", ["wanda", "gblm", "random"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_metric_on_another_sees_its_scores(base, pattern):
    assert_equal(masks(Squared(base=base), None, pattern), masks(base, None, pattern))


def test_a_metric_may_be_built_on_two_of_a_class_whose_options_differ():
    assert_equal(masks(Twice()), masks("sparsegpt"))


def test_a_refiner_and_an_allocator_may_use_another_metrics_scores():
    assert_equal(masks("magnitude", refine=Reselected(), options={"scope": "row"}), masks("wanda"))
    assert_equal(masks("wanda", 0.6, allocator=ByAnother()), masks("wanda", 0.6, allocator=ByTheRuns()))
    with pytest.raises(PruneForgeError, match="requires GradientMagnitude"):
        masks("wanda", allocator=ByAnother(base="gblm"))


def test_built_methods_keep_the_promises_of_their_kinds():
    for plugin in (Squared(), Squared(base="gblm"), Twice(), Reselected(), ByAnother()):
        assert [(check.name, said) for check, said in run_checks([plugin]) if said is not None] == []


def test_the_sources_of_what_a_method_is_built_on_are_found_however_deep():
    inner, outer, adapter = Squared(base="ria"), Squared(), pruneforge.create("adapter", "llama")
    outer.more = {"inner": inner, "others": 3}
    inner.back = (outer, "a text")  # a circle ends
    run = replace(run_of(outer, []), refiners=(Reselected(base="magnitude"),), allocator=ByAnother())
    packages = {"pruneforge_llama", "pruneforge_magnitude", "pruneforge_ria", "pruneforge_wanda"}
    found = plugin_sources([*run.parts, adapter], run.requires)
    assert packages <= found.keys()
    assert all(found[package]["distribution"] == "pruneforge-lab" for package in packages)


def test_a_run_does_not_go_on_when_what_its_metric_is_built_on_was_edited(tmp_path, monkeypatch):
    code = "from pruneforge import Metric\nclass Edited(Metric):\n    def score(self, layer, stats):\n"
    code += "        return layer.weight.abs()\n"
    file = tmp_path / "edited_base.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry = loaded_plugins().registry
    monkeypatch.setattr(registry, "plugin", "edited")
    registry.metric("edited", "edited_base:Edited")
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    settings = {"output": tmp_path / "out"}

    class Interrupted:
        @hookimpl
        def pruneforge_block_pruned(self, result):
            raise KeyboardInterrupt

    asked, observer = (tmp_path / "model", Squared(base="edited"), 0.5), Interrupted()
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune(*asked, **settings)
    finally:
        loaded_plugins().unregister(observer)
        registry.drop("edited")
    file.write_text(code + "# changed\n")
    with pytest.raises(PruneForgeError, match="is another one: plugin edited_base was"):
        pruneforge.prune(*asked, resume=True, **settings)
    file.write_text(code)
    assert "edited_base" in pruneforge.prune(*asked, resume=True, **settings).report["plugins"]
