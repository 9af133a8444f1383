"""Settings are declared once: as fields that the command line, Python and the documentation take over."""

from __future__ import annotations

import hashlib
import inspect
import json
import typing
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import pruneforge
from pruneforge.cli import app
from pruneforge.cli.fields import fields_of
from pruneforge.cli.settings import SettingsCommand, settings
from pruneforge.interfaces.recipe import EvalRecipe, PruneRecipe, RecoverRecipe
from pruneforge.runs.resources import Resources

CALIBRATED = ("--sparsity", "0.5", "--calibration", "python-docs", "--samples", "4", "--seqlen", "64")


def run(*arguments: object, application: typer.Typer = app):
    return CliRunner(env={"COLUMNS": "200"}).invoke(application, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("function", "models"),
    [
        (pruneforge.prune, (PruneRecipe, Resources)),
        (pruneforge.recover, (RecoverRecipe,)),
        (pruneforge.evaluate, (EvalRecipe,)),
    ],
)
def test_python_takes_every_setting_with_its_default_and_documents_it(function, models):
    parameters = inspect.signature(function).parameters
    text = " ".join(inspect.getdoc(function).split())
    for model in models:
        for name, field in model.model_fields.items():
            if name == "plugins":  # a property of the process in Python
                continue
            assert name in parameters, f"{function.__name__} lacks {name}"
            if not field.is_required():
                default = parameters[name].default
                assert (default or None) == (field.get_default(call_default_factory=True) or None), name
            takes_objects = ("allocator", "refine", "recover", "objective", "streams")
            own_words = name in ("model", "metric", "calibration", "progress", *takes_objects)
            assert own_words or f"{name}: {' '.join(field.description.split())}" in text, name


def test_the_command_takes_every_setting_with_its_description():
    command = typing.cast(Any, typer.main.get_command(app)).commands["prune"]
    options = {
        option.name: option for option in command.get_params(command.make_context("prune", [], resilient_parsing=True))
    }
    for name, field in {**PruneRecipe.model_fields, **fields_of(Resources)}.items():
        assert name in options, f"the command lacks {name}"
        if name not in ("metric", "sparsity", "pattern", "plugins"):  # which the command line writes in its own way
            assert field.description.removesuffix(".") in options[name].help


class Settings(BaseModel):
    """One field of every kind."""

    path: str = Field(description="where to")
    count: int | None = Field(None, ge=2, description="how many")
    share: float = Field(0.5, description="how much")
    kind: Literal["fast", "exact"] = Field("fast", description="which")
    quick: bool = Field(False, description="hurry")
    tied: bool = Field(True, description="keep together")
    names: list[str] = Field(default_factory=list, description="which ones")
    more_options: dict[str, Any] = Field(default_factory=dict, description="further ones")
    inner: object = Field(None, exclude=True, description="not for the command line")


class Command(SettingsCommand):
    def fields(self):
        return fields_of(Settings)


def application() -> typer.Typer:
    made = typer.Typer(add_completion=False)

    @made.command(cls=Command)
    def show(ctx: typer.Context) -> None:
        print(json.dumps(settings(ctx)))

    return made


def test_a_field_of_every_kind_becomes_an_option_and_only_what_was_given_arrives():
    made = application()
    assert json.loads(run("--path", "x", application=made).output) == {"path": "x"}
    everything = (
        "--path",
        "x",
        "--count",
        2,
        "--share",
        0.25,
        "--kind",
        "exact",
        "--quick",
        "--no-tied",
        "--name",
        "a",
    )
    done = run(*everything, "--name", "b", "--more-option", "a=[1]", "--more-option", "b=c", application=made)
    assert json.loads(done.output) == {
        "path": "x",
        "count": 2,
        "share": 0.25,
        "kind": "exact",
        "quick": True,
        "tied": False,
        "names": ["a", "b"],
        "more_options": {"a": [1], "b": "c"},
    }
    for wrong in (("--count", 1), ("--share", "much"), ("--kind", "slow"), ("--inner", "x"), ("--more-option", "a")):
        assert run("--path", "x", *wrong, application=made).exit_code != 0, wrong
    shown = " ".join(run("--help", application=made).output.split())
    for text in ("Where to.", "[required]", "How many.", "[default: 0.5]", "<fast|exact>", "Further ones. Repeatable."):
        assert text in shown, text
    assert "inner" not in shown


def test_options_of_the_metric_are_options_of_the_command(checkpoint, tmp_path):
    done = run("prune", checkpoint, "--metric", "wanda", "--scope=layer", *CALIBRATED, "--output", tmp_path / "a")
    assert done.exit_code == 0, done.output
    report = pruneforge.load(tmp_path / "a").report
    assert report["recipe"]["options"] == {"scope": "layer"}
    twice = ("--scope", "layer", "--option", "scope=output", "--output", tmp_path / "b")
    done = run("prune", checkpoint, "--metric", "wanda", *CALIBRATED, *twice)
    assert (done.exit_code, done.output.strip()) == (2, "pruneforge: option 'scope' is given twice")
    done = run("prune", checkpoint, "--metric", "magnitude", "--alpha", 3, "--output", tmp_path / "b")
    assert done.exit_code == 2
    assert "No such option: --alpha" in done.output
    done = run("prune", checkpoint, "--metric", "gbml", "--alpha", 3, "--output", tmp_path / "b")
    assert (done.exit_code, done.output.strip()) == (2, "pruneforge: unknown metric 'gbml'; did you mean 'gblm'?")
    assert not (tmp_path / "b").exists()


def test_several_metrics_are_made_in_one_pass_each_with_its_own_options(checkpoint, tmp_path):
    common = ("prune", checkpoint, "--metric", "wanda,gblm", *CALIBRATED, "--propagate", "dense")
    done = run(*common, "--option", "gblm.alpha=1", "--pattern", "2:4,4:8", "--output", tmp_path / "all")
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"{metric}-{pattern}" for metric in ("gblm", "wanda") for pattern in ("0.5", "2of4", "4of8")]
    assert pruneforge.load(tmp_path / "all" / "gblm-0.5").report["metric"]["options"]["alpha"] == 1
    assert pruneforge.load(tmp_path / "all" / "wanda-0.5").report["recipe"]["options"] == {}
    for wrong, said in (
        (("--option", "alpha=1"), "write --option NAME.alpha=..."),
        (("--option", "ria.alpha=1"), "unknown metric in options of several"),
        (("--propagate", "pruned"), "add --propagate dense"),
    ):
        done = run(*common, *wrong, "--output", tmp_path / "none")
        assert (done.exit_code, said in done.output) == (2, True), done.output
    assert not (tmp_path / "none").exists()


def test_options_of_the_source_and_of_a_plugin_file_are_options_of_the_command(checkpoint, tmp_path):
    file = tmp_path / "powered.py"
    file.write_text(
        "from pydantic import Field\nfrom pruneforge import Metric\n"
        "class Powered(Metric):\n"
        "    class Options(Metric.Options):\n"
        "        power: float = Field(1.0, description='exponent of the weight')\n"
        "        pack: bool = Field(False, description='a name that the source has too')\n"
        "    def score(self, layer, stats):\n"
        "        return layer.weight.abs() ** self.options.power\n"
    )
    chosen = ("--metric", "powered", "-p", file)
    shown = " ".join(run("prune", *chosen, "--calibration", "python-docs", "--help").output.split())
    assert "Options of metric powered" in shown
    assert "Exponent of the weight." in shown
    assert "--pack" not in shown  # whose would it be?
    shown = run("prune", "--metric", "wanda", "--calibration", "python-docs", "--help").output
    assert "--no-pack" in shown
    done = run("prune", checkpoint, *chosen, "--power", 0.5, "--output", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert pruneforge.load(tmp_path / "a").report["metric"]["options"]["power"] == 0.5


def test_options_of_the_evaluator_are_options_of_the_command_and_of_its_recipe(checkpoint, tmp_path):
    common = ("eval", checkpoint, "--task", "perplexity")
    done = run(*common, "--data", "python-docs", "--window", 32, "--limit", 2, "--json")
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.output)
    assert (outcome["window"], outcome["windows"]) == (32, 2)
    assert outcome["recipe"]["options"] == {"data": "python-docs", "window": 32, "limit": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: perplexity\ndata: python-docs\nwindow: 32\nlimit: 2\n")
    again = json.loads(run("eval", checkpoint, "--config", recipe, "--json").output)
    assert again["perplexity"] == outcome["perplexity"]
    done = run(*common, "--data", "python-docs", "--strict")
    assert done.exit_code == 2
    assert "No such option: --strict" in done.output
    done = run(*common, "--data", "python-docs", "--window", 100_000)
    assert done.exit_code == 2
    assert "window 100000 is longer than the model's context" in done.output
    recipe.write_text("task: perplexity\nwindw: 32\n")
    done = run("eval", checkpoint, "--config", recipe)
    assert (done.exit_code, "did you mean 'window'" in done.output) == (2, True)


def test_messages_name_a_plugins_options_as_they_are_typed(checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too little")
    done = run("eval", checkpoint, "--task", "perplexity", "--data", short, "--window", 64)
    assert done.exit_code == 2
    assert "use a shorter --window or more text" in done.output


def test_evaluate_takes_options_as_keywords_or_as_a_mapping_but_not_both(checkpoint):
    asked = {"data": "python-docs", "window": 32, "limit": 1}
    by_name = pruneforge.evaluate(checkpoint, "perplexity", **asked)
    assert by_name["perplexity"] == pruneforge.evaluate(checkpoint, "perplexity", asked)["perplexity"]
    with pytest.raises(pruneforge.PruneForgeError, match="option 'limit' is given twice"):
        pruneforge.evaluate(checkpoint, "perplexity", asked, limit=1)
    with pytest.raises(pruneforge.PruneForgeError, match="unknown option of perplexity 'windw'; did you mean 'window'"):
        pruneforge.evaluate(checkpoint, "perplexity", data="python-docs", windw=32)


def test_an_unknown_setting_from_python_is_refused_with_the_nearest(checkpoint, tmp_path):
    with pytest.raises(pruneforge.PruneForgeError, match="unknown setting 'sampels'; did you mean 'samples'"):
        pruneforge.prune_each(checkpoint, "magnitude", [0.5], output=tmp_path / "out", sampels=3)


def test_options_of_plugins_may_stand_before_the_model_or_beside_a_recipe(checkpoint, tmp_path):
    asked = ("--data", "python-docs", "--window", 32, "--limit", 1)
    done = run("eval", *asked, checkpoint, "--task", "perplexity", "--json")
    assert done.exit_code == 0, done.output
    done = run("eval", "--limit=1", checkpoint, "--task=perplexity", "--data=python-docs", "--window=32", "--json")
    assert done.exit_code == 0, done.output
    results = tmp_path / "results.json"
    done = run("eval", checkpoint, "--task", "perplexity", *asked, "--output", results, "--json")
    assert done.exit_code == 0, done.output
    again = run("eval", checkpoint, "--config", results, "--limit", 2, "--json")  # the command line wins
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["windows"] == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\ntask: perplexity\noptions: {{data: python-docs, window: 64, limit: 1}}\n")
    assert json.loads(run("eval", "--config", recipe, "--window", 32, "--json").output)["window"] == 32
    recipe.write_text(f"model: {checkpoint}\ntask: perplexity\ndata: python-docs\nwindow: 64\nlimit: 1\n")
    given = ("--option", "window=32", "--option", "data=python-docs")
    assert json.loads(run("eval", "--config", recipe, *given, "--json").output)["window"] == 32


def test_a_plugin_does_not_take_a_flag_of_the_command(tmp_path, checkpoint):
    file = tmp_path / "greedy.py"
    file.write_text(
        "from pydantic import Field\nfrom pruneforge import Metric\n"
        "class Greedy(Metric):\n"
        "    class Options(Metric.Options):\n"
        "        plugin: str = Field('', description='[out, in]')\n"
        "        option: str = Field('', description='a flag of the command')\n"
        "        dry: float = Field(0.0, description='its own [out, in]')\n"
        "        maybe: dict[str, int] | None = Field(None, description='a mapping')\n"
        "        pair: tuple[int, int] = Field((0, 0), description='no flag')\n"
        "    def score(self, layer, stats):\n"
        "        return layer.weight.abs()\n"
    )
    common = ("prune", checkpoint, "--metric", "greedy", "-p", file)
    shown = " ".join(run(*common, "--help").output.split())
    assert "Its own [out, in]." in shown
    assert "--pair" not in shown
    given = ("--dry", -2, "--maybe", "a=1", "--option", "plugin=q", "--option", "pair=[1, 2]", "--json")
    done = run(*common, *given, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    options = json.loads(done.output)["metric"]["options"]
    assert {"plugin": "q", "dry": -2.0, "maybe": {"a": 1}, "pair": [1, 2]}.items() <= options.items()


def test_plugins_of_a_recipe_must_be_a_list_and_help_loads_none(tmp_path, checkpoint):
    recipe = tmp_path / "recipe.yaml"
    for value in ("3", "mine.py"):
        recipe.write_text(f"metric: magnitude\nplugins: {value}\n")
        done = run("prune", checkpoint, "--config", recipe, "--output", tmp_path / "out")
        assert done.exit_code == 2
        assert "plugins must be a list of files" in done.output
    (tmp_path / "loud.py").write_text("print('loaded')\n")
    recipe.write_text(f"metric: magnitude\nplugins: [{tmp_path / 'loud.py'}]\n")
    assert "loaded" not in run("prune", "--config", recipe, "--help").output
    assert "Usage" in run("prune", "--metric", "typo", "--help").output


def test_a_plugin_file_in_a_recipe_runs_only_if_the_command_line_names_it(tmp_path, checkpoint):
    file, recipe = tmp_path / "loud.py", tmp_path / "recipe.yaml"
    file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    recipe.write_text(f"model: {checkpoint}\nmetric: magnitude\nplugins: [{file}]\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for command in ("prune", "eval", "doctor", "plugins", "sweep"):
        done = run(command, "--config", recipe)
        assert done.exit_code == 2, command
        assert f"{str(file)!r}, which has the SHA-256 {digest}" in done.output
        assert f"add -p {file}" in done.output
    assert not (tmp_path / "ran").exists()
    done = run("prune", "--config", recipe, "-p", file, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "ran").exists()


def test_the_first_mistake_is_named_whatever_else_is_wrong(checkpoint, tmp_path):
    common = ("prune", checkpoint, "--metric", "wanda", "--calibration", tmp_path / "none.txt")
    done = run(*common, "--sparsity", 2, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "sparsity" in done.output
    with pytest.raises(pruneforge.PruneForgeError, match="unknown setting 'plugins'"):
        pruneforge.prune_each(checkpoint, "magnitude", [0.5], output=tmp_path / "out", plugins=[])
    with pytest.raises(pruneforge.PruneForgeError, match="an estimate is for one pattern"):
        pruneforge.estimate(checkpoint, "magnitude", patterns=[0.3, 0.5])
    with pytest.raises(pruneforge.PruneForgeError, match="its sparsities and patterns as `patterns`, not as sparsity="):
        pruneforge.estimate_each(checkpoint, "magnitude", [0.3], sparsity=0.5)


def test_a_recipe_of_several_refiners_repeats_the_run(checkpoint, tmp_path):
    common = ("prune", checkpoint, "--metric", "wanda", *CALIBRATED)
    file = tmp_path / "twice.py"
    file.write_text("from pruneforge_sparseswaps.refiner import SparseSwaps\nclass Twice(SparseSwaps):\n    pass\n")
    refine = ("-p", file, "--refine", "sparseswaps", "--refine", "twice", "--refine-option", "twice.steps=3")
    done = run(*common, *refine, "--output", tmp_path / "first")
    assert done.exit_code == 0, done.output
    done = run("prune", "--config", tmp_path / "first" / "recipe.yaml", "-p", file, "--output", tmp_path / "second")
    assert done.exit_code == 0, done.output
    first, second = (pruneforge.load(tmp_path / name).report["recipe"] for name in ("first", "second"))
    assert first["refine_options"].keys() == second["refine_options"].keys() == {"twice"}


def test_options_that_run_code_are_taken_as_typed_in_every_form():
    from pruneforge.cli.typed import typed_options
    from pruneforge.errors import PruneForgeError
    from pruneforge.trust import check_typed, typed

    check_typed("include_path", "a b")  # from Python, whoever calls
    forms = [
        ["--include-path", "a b"],
        ["--include-path=a b"],
        ["--option", "include_path=a b"],
        ["--option=include_path=a b"],
        ["--option", "lm-eval.include_path=a b"],
        ["--allocator-option", 'task_options={"include_path": "a b"}'],
        ["--trust", "include_path=a b"],
    ]
    for form in forms:
        with typed(typed_options(["eval", *form, "--quiet"])):
            check_typed("include_path", "a b")
            with pytest.raises(PruneForgeError, match="which may run code"):
                check_typed("include_path", "a")
    others = [["eval", "a b"], ["--output", "a b"], ["--option", "path=a b"], ["--option", "not_include_path=a b"]]
    for form in others:
        with typed(typed_options(form)), pytest.raises(PruneForgeError, match="which may run code"):
            check_typed("include_path", "a b")
    check_typed("include_path", "a b")
