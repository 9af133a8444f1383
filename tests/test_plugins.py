"""Discovery, lazy loading, blocking, single files, and errors that stay with their plugin."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tokens
from pydantic import Field

import pruneforge
from pruneforge import Metric, Options, Pruned, PruneForgeError, Registry, Statistic
from pruneforge.interfaces import hookspecs
from pruneforge.interfaces.options import describe_options
from pruneforge.interfaces.registry import KINDS
from pruneforge.plugins import Plugins

NINE_LINES = '''
from pruneforge import ColumnSquares, Metric


class Ria(Metric):
    """Relative importance and activations (Zhang et al., 2024), simplified."""
    requires = (ColumnSquares,)
    def score(self, layer, stats):
        w = layer.weight.abs()
        return (w / w.sum(0) + w / w.sum(1, keepdim=True)) * stats[ColumnSquares].per_sample() ** 0.25
'''


@pytest.fixture
def fresh() -> Plugins:
    """Plugins of this test alone, nothing discovered."""
    return Plugins()


def test_a_single_file_is_a_plugin(fresh, tmp_path):
    file = tmp_path / "ria.py"
    file.write_text(NINE_LINES)
    fresh.load_file(file)
    fresh.load_file(file)
    assert [entry.name for entry in fresh.registry.entries("metric")] == ["ria"]
    assert [(p.name, p.origin, p.error) for p in fresh.loaded] == [(str(file), str(file), None)]
    masks = pruneforge.prune(tiny_llama(), fresh.registry.create("metric", "ria"), 0.5, "2:4", [tokens()]).masks
    assert all(mask.float().mean() == 0.5 for mask in masks.values())


def test_installed_plugins_are_found_by_their_entry_points(fresh):
    fresh.load_installed()
    assert {"magnitude", "wanda", "sparsegpt", "gblm"} <= {e.name for e in fresh.registry.entries("metric")}
    assert all(p.error is None for p in fresh.loaded), [p.error for p in fresh.loaded]
    assert all(p.origin and p.version for p in fresh.loaded)


@pytest.mark.parametrize("blocked", ["wanda", "magnitude", "sparsegpt", "gblm", "llama", "text", "perplexity"])
def test_without_one_plugin_everything_else_works(blocked):
    found = Plugins()
    found.load_installed(f"-{blocked}")
    everything = Plugins()
    everything.load_installed()
    assert {p.name for p in everything.loaded} - {p.name for p in found.loaded} == {blocked}
    for kind in ("metric", "adapter", "source", "evaluator"):
        assert all(entry.plugin != blocked and entry.load() for entry in found.registry.entries(kind))


def test_the_variable_limits_and_blocks(fresh):
    fresh.load_installed("wanda, llama")
    assert [p.name for p in fresh.loaded] == ["llama", "wanda"]
    none = Plugins()
    none.load_installed("")
    assert none.loaded == []


@pytest.mark.parametrize(
    ("selection", "said"),
    [("wnda", "did you mean 'wanda'"), ("-wnda", "did you mean 'wanda'"), ("wanda,-gblm", "both")],
)
def test_a_wrong_variable_is_named(fresh, selection, said):
    with pytest.raises(PruneForgeError) as error:
        fresh.load_installed(selection)
    assert said in str(error.value)
    assert "PRUNEFORGE_PLUGINS" in str(error.value)


def test_a_broken_plugin_is_reported_and_leaves_nothing_behind(fresh, tmp_path):
    half = tmp_path / "half.py"
    half.write_text(
        "from pruneforge import hookimpl, Metric\n"
        "@hookimpl\n"
        "def pruneforge_register(registry):\n"
        "    registry.metric('first', Metric)\n"
        "    raise RuntimeError('no second')\n"
    )
    with pytest.raises(PruneForgeError, match="failed to load: RuntimeError: no second"):
        fresh.load_file(half)
    assert fresh.registry.entries("metric") == []
    assert "no second" in fresh.loaded[0].error
    fresh.load_installed("wanda")
    assert [entry.name for entry in fresh.registry.entries("metric")] == ["wanda"]
    with pytest.raises(PruneForgeError, match="does not exist"):
        fresh.load_file(tmp_path / "nowhere.py")


def test_a_target_that_cannot_be_imported_is_an_error_when_it_is_asked_for(fresh):
    fresh.registry.plugin = "mine"
    fresh.registry.metric("ghost", "no_such_module:Ghost")
    with pytest.raises(PruneForgeError, match="metric 'ghost' of plugin 'mine' cannot be imported"):
        fresh.registry.create("metric", "ghost")


def test_two_plugins_cannot_take_one_name(fresh, tmp_path):
    file = tmp_path / "again.py"
    file.write_text("from pruneforge import Metric\nclass Wanda(Metric): pass\n")
    fresh.load_installed("wanda")
    with pytest.raises(PruneForgeError, match="already registered by plugin 'wanda'"):
        fresh.load_file(file)


def test_a_file_that_is_called_like_a_plugin_leaves_it_alone(fresh, tmp_path):
    fresh.load_installed("wanda")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "wanda.py"
        file.write_text(f"from pruneforge import Metric\nclass Mine{folder}(Metric): pass\n")
        fresh.load_file(file)
    assert [entry.name for entry in fresh.registry.entries("metric")] == ["minea", "mineb", "wanda"]


def test_one_broken_target_leaves_the_others_usable(fresh, tmp_path, monkeypatch):
    (tmp_path / "rotten_adapter.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh.load_installed()
    fresh.registry.adapter("aaa", "rotten_adapter:Rotten")
    fresh.registry.source("aaa", "rotten_adapter:Rotten")
    from pruneforge.interfaces.source import create_source
    from pruneforge.runs.loading import load_model

    assert load_model(tiny_llama(), "auto", None, fresh.registry).adapter.name == "llama"
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert create_source(text, {}, fresh.registry).name == "text"
    with pytest.raises(PruneForgeError, match=r"aaa: adapter 'aaa'.*SyntaxError"):
        load_model(torch.nn.Linear(2, 2), "auto", None, fresh.registry)


def test_unknown_names_are_answered_with_the_nearest(fresh):
    fresh.load_installed()
    for kind, name, near in [
        ("metric", "wandas", "wanda"),
        ("source", "wikitext", "wikitext2"),
        ("adapter", "lama", "llama"),
    ]:
        with pytest.raises(PruneForgeError, match=f"unknown {kind} '{name}'; did you mean '{near}'"):
            fresh.registry.create(kind, name)


class Scaled(Metric):
    """For the tests of options."""

    class Options(Metric.Options):
        power: float = Field(1.0, gt=0, description="exponent")
        mode: str = "plain"

    options: Options

    def score(self, layer, stats):
        return layer.weight.abs() ** self.options.power


def test_options_are_typed_validated_and_described():
    assert Scaled(power="2.5").options.power == 2.5
    with pytest.raises(PruneForgeError, match="unknown option of scaled 'pwoer'; did you mean 'power'"):
        Scaled(pwoer=1)
    with pytest.raises(PruneForgeError, match="option power='much' of scaled"):
        Scaled(power="much")
    with pytest.raises(PruneForgeError, match="option power=-1 of scaled: input should be greater than 0"):
        Scaled(power=-1)
    described = {option["name"]: option for option in describe_options(Scaled)}
    assert described["power"] == {
        "name": "power",
        "type": "float",
        "default": 1.0,
        "required": False,
        "description": "exponent",
    }
    assert described["scope"]["type"] == "row|layer|block|model|None"


def test_a_metric_instance_is_as_good_as_a_name():
    by_name = pruneforge.prune(tiny_llama(), "magnitude", 0.5).masks
    by_instance = pruneforge.prune(tiny_llama(), Scaled(power=3, scope="layer"), 0.5).masks
    assert all(torch.equal(by_name[name], by_instance[name]) for name in by_name)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda layer, stats: layer.weight * torch.nan, "with NaN"),
        (lambda layer, stats: layer.weight[0], "its weight has"),
    ],
)
def test_a_broken_score_is_named(score, said):
    metric = Scaled()
    metric.score = score
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny_llama(), metric, 0.5)
    assert said in str(error.value)
    assert "model.layers.0.self_attn.q_proj" in str(error.value)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (lambda shape: torch.zeros(shape, dtype=torch.bool), "does not fit 0.5"),
        (lambda shape: torch.ones(shape), "must be boolean"),
        (lambda shape: torch.ones(shape[1], dtype=torch.bool), "must be boolean"),
    ],
)
def test_a_mask_that_does_not_fit_the_pattern_is_refused(mask, said):
    metric = Scaled()
    metric.prune_layer = lambda layer, stats, pattern: Pruned(mask(layer.shape))
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny_llama(), metric, 0.5)
    assert said in str(error.value)


@pytest.mark.parametrize("scope", ["row", "layer", "block", "model"])
def test_a_random_metric_is_exact_and_the_same_each_time(scope):
    metric = Scaled(scope=scope)
    metric.score = lambda layer, stats: torch.rand(layer.shape)
    first, second = (pruneforge.prune(tiny_llama(), metric, 0.5) for _ in range(2))
    assert first.report["sparsity"]["pruned"] * 2 == first.report["sparsity"]["weights"]
    assert all(torch.equal(first.masks[name], mask) for name, mask in second.masks.items())


def test_a_statistic_that_nothing_feeds_is_refused():
    metric = Scaled()
    metric.requires = (Statistic,)
    with pytest.raises(PruneForgeError, match="requires Statistic, which is not one of InputStatistic"):
        pruneforge.prune(tiny_llama(), metric, 0.5, None, [tokens()])


def test_every_hook_is_documented_with_its_exact_signature():
    text = (Path(__file__).parents[1] / "docs" / "guide" / "plugins.md").read_text()
    hooks = [f for name, f in vars(hookspecs).items() if name.startswith("pruneforge_")]
    assert len(hooks) == 4
    for hook in hooks:
        arguments = ", ".join(inspect.signature(hook).parameters)
        assert f"### `{hook.__name__}({arguments})`" in text
        assert len(inspect.getdoc(hook)) > 60


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from pruneforge.cli import app\n"
        "try: app(['prune', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'lm_eval', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--calibration" in done.stdout


def test_the_framework_names_no_metric_and_no_architecture():
    names = [
        e.name for kind in ("metric", "adapter", "allocator", "refiner") for e in _everything().registry.entries(kind)
    ]
    assert len(names) >= 5
    for file in (Path(pruneforge.__file__).parent).rglob("*.py"):
        text = file.read_text().lower()
        # Some are ordinary words too, timm a library whose version is reported.
        ordinary = {"magnitude", "timm", "random", "file", "uniform", "search"}
        assert not [n for n in names if n not in ordinary and re.search(rf"\b{re.escape(n)}", text)], file


def _everything() -> Plugins:
    found = Plugins()
    found.load_installed()
    return found


def test_options_class_is_shared_by_every_kind():
    for kind in KINDS:
        for entry in _everything().registry.entries(kind):
            cls = entry.load()
            assert issubclass(cls.Options, Options)
            assert inspect.getdoc(cls), entry.name
            assert all(option["description"] for option in describe_options(cls)), entry.name


def test_what_needs_a_library_that_is_not_there_says_which_extra_brings_it(fresh):
    fresh.registry.distribution = "some-plugin"
    fresh.registry.metric("far", "no_such_package.metric:Far", library="no_such_library", extra="far")
    with pytest.raises(PruneForgeError) as error:
        fresh.registry.create("metric", "far")
    assert str(error.value) == (
        "metric 'far' needs no_such_library, which is not installed; install the extra 'far' of some-plugin "
        "(in a clone: pip install '.[far]')"
    )
    fresh.registry.distribution = ""
    fresh.registry.metric("near", "no_such_package.metric:Near", library="no.such.module", extra="near")
    with pytest.raises(PruneForgeError, match=r"metric 'near' needs no\.such\.module, which is not installed$"):
        fresh.registry.create("metric", "near")
    with pytest.raises(PruneForgeError, match="names a library and no extra"):
        fresh.registry.metric("half", "no_such_package.metric:Half", library="no_such_library")


def test_the_other_project_of_this_name_is_refused(tmp_path):
    info = tmp_path / "pruneforge-0.1.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pruneforge\nVersion: 0.1.4\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pruneforge", "plugins"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "pruneforge: the distribution 'pruneforge' 0.1.4 is installed, which is another project"
    )
    assert len(done.stderr.splitlines()) == 1


def test_the_list_says_what_cannot_be_used_without_importing_it(tmp_path, monkeypatch):
    for name, code in (("fails_early", "raise RuntimeError('rotten')"), ("has_one", "class One:\n    '''First.'''\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code if name == "fails_early" else "")
        (tmp_path / name / "part.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    registry.metric("one", "has_one.part:One")
    registry.metric("two", "has_one.part:Two")
    registry.metric("three", "has_one.none:Three")
    registry.metric("four", "fails_early.part:Four")
    registry.metric("five", "has_one.part:One", library="no_such_library", extra="more")
    registry.metric("six", "fails_early.part:Six", library="no_such_library", extra="more")
    said = {entry.name: entry.summary() for entry in registry.entries("metric")}
    assert said["one"] == "First."
    assert said["two"].endswith("there is no Two")
    assert said["three"].endswith("there is no has_one.none")
    assert said["four"].endswith("RuntimeError: rotten")
    assert said["five"] == "First."
    assert "has_one.part" not in sys.modules
    lacking = {entry.name: entry.lacking() for entry in registry.entries("metric")}
    assert lacking["one"] is None
    assert lacking["five"] == "metric 'five' needs no_such_library, which is not installed"
    assert registry.get("metric", "five").load().__name__ == "One"  # which describes itself all the same
    with pytest.raises(PruneForgeError, match=r"^metric 'six' needs no_such_library, which is not installed$"):
        registry.get("metric", "six").load()
