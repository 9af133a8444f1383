"""The commands as a user types them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import commands
import pytest
import torch
import yaml
from commands import SETTINGS, invoke

import pruneforge
from pruneforge.interfaces.registry import KINDS
from pruneforge.plugins import loaded_plugins


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return commands.run(*arguments, COLUMNS="200", **environment)


def test_prune_then_eval(checkpoint, tmp_path):
    out = tmp_path / "out"
    done = shell("prune", checkpoint, *SETTINGS, "--option", "scope=layer", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "weights (50.00%)" in done.stdout
    assert done.stdout.rstrip().endswith(f"wrote {out}")
    assert done.stderr == ""  # no bars, no library chatter when it is no terminal
    report = json.loads((out / "pruneforge.json").read_text())
    assert report["metric"] == {"name": "wanda", "options": {"scope": "layer"}}
    results = tmp_path / "results.json"
    done = shell(
        "eval", out, "--task", "perplexity", "--data", "python-docs", "--limit", 3, "--output", results, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    assert printed == json.loads(results.read_text())
    assert printed["windows"] == 3
    assert invoke("eval", "--config", results, "--json").exit_code == 0


def test_a_recipe_repeats_a_run_and_the_command_line_wins(checkpoint, tmp_path):
    assert invoke("prune", checkpoint, *SETTINGS, "--option", "scope=layer", "--output", tmp_path / "a").exit_code == 0
    for config in ("recipe.yaml", "pruneforge.json"):
        again = tmp_path / f"b-{config}"
        assert invoke("prune", "--config", tmp_path / "a" / config, "--output", again).exit_code == 0
        first, second = pruneforge.load(tmp_path / "a"), pruneforge.load(again)
        assert all(torch.equal(first.masks[name], mask) for name, mask in second.masks.items())
        assert first.report["recipe"] == second.report["recipe"]
    assert (
        invoke(
            "prune", "--config", tmp_path / "a" / "recipe.yaml", "--sparsity", 0.25, "--output", tmp_path / "c"
        ).exit_code
        == 0
    )
    assert yaml.safe_load((tmp_path / "c" / "recipe.yaml").read_text())["sparsity"] == 0.25


def test_bad_recipes_are_named(checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for content, said in [
        ("sparsty: 0.5", "did you mean 'sparsity'"),
        ("- 1", "holds no settings"),
        ("a: [", "is not plain YAML"),
    ]:
        recipe.write_text(content)
        done = invoke("prune", checkpoint, *SETTINGS, "--config", recipe, "--output", tmp_path / "out")
        assert done.exit_code == 2
        assert said in done.output
        assert len(done.output.strip().splitlines()) == 1
    assert invoke("prune", "--config", tmp_path / "none.yaml", "--output", tmp_path / "out").exit_code == 2


def test_a_single_file_metric_is_used_and_recorded(checkpoint, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom pruneforge import Metric\n"
        "class Mine(Metric):\n"
        '    """A random control."""\n'
        "    def score(self, layer, stats):\n"
        "        return torch.rand(layer.shape)\n"
    )
    for name in ("a", "b"):
        done = invoke("prune", checkpoint, "-p", file, "--metric", "mine", "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
    first, second = pruneforge.load(tmp_path / "a"), pruneforge.load(tmp_path / "b")
    assert first.report["recipe"]["plugins"] == [str(file)]
    assert all(torch.equal(first.masks[name], mask) for name, mask in second.masks.items())
    assert len({mask.float().mean().item() for mask in first.masks.values()}) == 1
    listed = shell("plugins", "--json", "-p", file)
    assert {"mine"} <= {item["name"] for item in json.loads(listed.stdout)["registered"]}


def test_plugins_lists_options_types_defaults_origin_and_version():
    done = shell("plugins", "--json")
    listed = json.loads(done.stdout)
    registered = {(item["kind"], item["name"]): item for item in listed["registered"]}
    assert {("metric", "gblm"), ("adapter", "llama"), ("source", "c4"), ("evaluator", "perplexity")} <= set(registered)
    alpha = next(option for option in registered["metric", "gblm"]["options"] if option["name"] == "alpha")
    assert (alpha["type"], alpha["default"]) == ("float", 100.0)
    assert all(plugin["origin"] and plugin["version"] for plugin in listed["plugins"])
    table = " ".join(shell("plugins", "gblm").stdout.split())
    assert table.startswith("metric gblm, of plugin gblm (pruneforge-lab ")
    assert "the paper uses alpha 100 with 128 samples" in table  # the whole description
    assert "alpha │ float │ 100 │" in table
    assert "l1|l2" in table
    assert "python-docs" not in table
    assert invoke("plugins", "gbml").output == "pruneforge: unknown plugin name 'gbml'; did you mean 'gblm'?\n"
    limited = json.loads(shell("plugins", "--json", PRUNEFORGE_PLUGINS="wanda").stdout)
    assert [item["name"] for item in limited["registered"]] == ["wanda"]


def test_lists_and_help_do_without_torch():
    """Which takes seconds to import."""
    code = (
        "import sys; from pruneforge.cli import app\n"
        "for command in (['--help'], ['plugins'], ['prune', '--help'], ['eval', '--help']):\n"
        "    try: app(command)\n"
        "    except SystemExit as end: assert not end.code, command\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        for entry in loaded_plugins().registry.entries(kind):
            assert entry.name in done.stdout
            assert entry.summary() == inspect.getdoc(entry.load()).partition("\n")[0] != ""


def test_a_plugin_that_fails_is_shown_and_the_rest_works(tmp_path):
    """An installed distribution, as pip would lay it out, whose plugin raises."""
    info = tmp_path / "broken-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 9\n")
    (info / "entry_points.txt").write_text("[pruneforge]\nbroken = broken_plugin\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('rotten')\n")
    command = [sys.executable, "-m", "pruneforge", "plugins", "--json"]  # Python reads the variable when it starts
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    listed = json.loads(done.stdout)
    broken = next(plugin for plugin in listed["plugins"] if plugin["name"] == "broken")
    assert (broken["origin"], broken["version"]) == ("broken", "9")
    assert "Traceback" in broken["error"]
    assert "RuntimeError: rotten" in broken["error"]
    assert {"wanda", "llama"} <= {item["name"] for item in listed["registered"]}
    assert "warning: plugin 'broken' (broken 9) failed to load: RuntimeError: rotten" in done.stderr


def test_doctor_says_what_works():
    done = shell("doctor", "--json")
    found = json.loads(done.stdout)
    assert set(found) == {"versions", "machine", "plugins", "registered", "cache", "works here"}
    assert found["works here"]["every registered name"] == "imports"
    assert "perplexity" not in found["works here"]["without their library"]
    assert found["versions"]["torch"]
    assert "works here" in shell("doctor").stdout


def test_demo_prunes_both_models_with_a_metric_at_both_patterns():
    few = "demo,llama,timm,perplexity,imagenet,magnitude"
    done = shell("demo", "--json", PRUNEFORGE_PLUGINS=few)
    assert done.returncode == 0, done.stderr
    for half, result in (("image", "top1"), ("text", "perplexity")):
        dense, *rows = json.loads(done.stdout)[half]["rows"]
        assert [(row["metric"], row["pattern"]) for row in rows] == [("magnitude", "0.5"), ("magnitude", "2:4")]
        assert all((row[result] < dense[result]) == (half == "image") for row in rows)


METRICS = (
    "admm",
    "alps",
    "d2prune",
    "gblm",
    "magnitude",
    "pruner-zero",
    "random",
    "ria",
    "sparsegpt",
    "wanda",
    "wanda++",
)


@pytest.mark.slow
def test_demo_prunes_with_every_metric_at_both_patterns():
    done = shell("demo", "--json")
    assert done.returncode == 0, done.stderr
    assert "gaprune is left out: it needs further calibration data, general" in done.stderr
    halves = json.loads(done.stdout)
    digits = {(row["metric"], row["pattern"]): row["top1"] for row in halves["image"]["rows"]}
    assert len(digits) == 1 + 2 * len(METRICS)
    assert digits["dense", ""] > 0.95
    methods = {key: accuracy for key, accuracy in digits.items() if key[0] not in ("dense", "random")}
    assert all(digits["dense", ""] >= accuracy > 0.8 for accuracy in methods.values())
    assert all(digits["random", pattern] < 0.5 < digits["dense", ""] for pattern in ("0.5", "2:4"))  # the control
    rows = halves["text"]["rows"]
    assert [(row["metric"], row["pattern"]) for row in rows] == [
        ("dense", ""),
        *((metric, pattern) for pattern in ("0.5", "2:4") for metric in METRICS),
    ]
    dense = rows[0]["perplexity"]
    for row in rows[1:]:
        assert row["sparsity"] == 0.5
        assert dense < row["perplexity"]
        assert (row["perplexity"] < 3 * dense) == (row["metric"] != "random")
        assert row["seconds"] > 0
        assert row["peak_memory_bytes"] > 0


def test_an_interrupted_run_says_how_to_go_on(checkpoint, tmp_path):
    observer = tmp_path / "interrupt.py"
    observer.write_text(
        "import os, signal\nfrom pruneforge import hookimpl\n"
        "@hookimpl\ndef pruneforge_register(registry): pass\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "@hookimpl\ndef pruneforge_block_pruned(result):\n"
        f"    if result.index == 2 and os.path.exists({str(tmp_path / 'armed')!r}):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    (tmp_path / "armed").touch()
    out = tmp_path / "out"
    done = shell("prune", checkpoint, *SETTINGS, "-p", observer, "--output", out)
    assert done.returncode == 130
    assert done.stderr.strip() == f"pruneforge: interrupted; {out} holds what is finished, go on with --resume"
    (tmp_path / "armed").unlink()
    done = shell("prune", checkpoint, *SETTINGS, "-p", observer, "--output", out)
    assert done.returncode == 2
    assert "holds an unfinished run; go on with --resume" in done.stderr
    source = observer.read_text()
    observer.write_text(source + "# another metric, perhaps")
    done = shell("prune", checkpoint, *SETTINGS, "-p", observer, "--output", out, "--resume")
    assert done.returncode == 2
    assert "is another one: plugin file" in done.stderr
    observer.write_text(source)
    done = shell("prune", checkpoint, *SETTINGS, "-p", observer, "--output", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert pruneforge.load(out).report["sparsity"]["reached"] == 0.5


@pytest.mark.parametrize("metric", ["magnitude", "sparsegpt", "gblm"])
def test_a_dry_run_counts_and_measures_and_writes_nothing(checkpoint, tmp_path, metric):
    prune = ("prune", checkpoint, *SETTINGS, "--metric", metric)
    done = invoke(*prune, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert invoke(*prune, "--output", tmp_path / "out").exit_code == 0
    report = pruneforge.load(tmp_path / "out").report
    assert found["blocks"] == 5
    assert found["layers"] == len(report["layers"])
    assert found["weights"] == report["sparsity"]["weights"]
    assert abs(found["pruned"] - report["sparsity"]["pruned"]) <= 0.01 * found["weights"]
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    gradients = 4 * found["weights"] if metric == "gblm" else 0
    assert found["disk_bytes"] == pytest.approx(written + gradients, rel=0.05)
    assert found["host_bytes"] > 100e6
    assert (metric == "gblm") == ("gradients" in found["seconds"])
    table = invoke(*prune, "--dry-run")
    assert "peak host memory" in table.output
    assert "time, but for writing" in table.output
    missing = invoke(*prune)
    assert missing.exit_code == 2
    assert "Missing option '--output'" in missing.output


def test_several_patterns_get_a_folder_and_a_line_each(checkpoint, tmp_path):
    few = ["--calibration", "python-docs", "--samples", "4", "--seqlen", "32", "--propagate", "dense", "--profile"]
    several = ["--metric", "wanda", "--sparsity", "0.25,0.5", "--pattern", "2:4"]
    done = invoke("prune", checkpoint, *several, *few, "--output", tmp_path / "all")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["0.25", "0.5", "2of4"]
    assert all(f"wrote {tmp_path / 'all' / name}" in done.output for name in ("0.25", "0.5", "2of4"))
    assert "(25.00%)" in done.output
    assert done.output.count("(50.00%)") == 2
    assert "seconds by block and stage" in done.output
    recipe = tmp_path / "all" / "2of4" / "recipe.yaml"
    assert invoke("prune", "--config", recipe, "--output", tmp_path / "again").exit_code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == recipe.with_name("model.safetensors").read_bytes()
    printed = invoke("prune", checkpoint, *several, *few, "--output", tmp_path / "json", "--json")
    assert [report["pattern"]["pattern"] for report in json.loads(printed.stdout)] == ["0.25", "0.5", "2:4"]
    dry = invoke("prune", checkpoint, *several, *few, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    found, reports = json.loads(dry.stdout), json.loads(printed.stdout)
    pruned = sum(report["sparsity"]["pruned"] for report in reports)
    written = sum(path.stat().st_size for path in (tmp_path / "json").glob("*/*"))
    assert found["models"] == 3
    assert found["pruned"] == pytest.approx(pruned, rel=0.01)
    assert found["disk_bytes"] == pytest.approx(written, rel=0.05)
    assert "of 3 x" in invoke("prune", checkpoint, *several, *few, "--dry-run").output


def test_an_image_model_is_pruned_evaluated_and_strict_about_its_images(tmp_path):
    import numpy as np
    from PIL import Image

    from pruneforge_demo import digits

    pixels, labels = digits.images("calibration")
    for index, (image, label) in enumerate(zip(pixels[:60], labels[:60], strict=True)):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(folder / f"{index}.png")
    (tmp_path / "images" / "0" / "damaged.png").write_bytes(b"nothing")
    prune = ("prune", "demo:image", "--metric", "gblm", "--calibration", tmp_path / "images", "--samples", 60)
    done = shell(*prune, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 corrupt images were left out: 0/damaged.png" in done.stderr
    assert pruneforge.load(tmp_path / "out").report["calibration"]["loss"] == "cross-entropy of the label"
    evaluate = ("eval", tmp_path / "out", "--task", "imagenet", "--data", tmp_path / "images")
    done = shell(*evaluate, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 60
    assert json.loads(done.stdout)["top1"] > 0.8
    for command in ((*prune, "--output", tmp_path / "strict"), evaluate):
        failed = shell(*command, "--strict")
        assert failed.returncode == 2
        assert "image '0/damaged.png' is corrupt" in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1


def test_warnings_reach_the_user_and_the_report(checkpoint, tmp_path):
    done = shell(
        "prune", checkpoint, *SETTINGS, "--metric", "sparsegpt", "--samples", 1, "--option", "damping=1e-30",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pruneforge: warning: model.layers.0.self_attn.q_proj: damping raised to" in done.stderr
    assert pruneforge.load(tmp_path / "out").report["warnings"]


def test_tables_show_values_as_people_write_them():
    from pruneforge.cli.common import shown

    values = [None, [], {}, True, False, 12345, 0.123456, [0.5, 0.75], "text", [{"label": "a", "images": 1200}]]
    assert [shown(value) for value in values] == [
        *("", "", "", "yes", "no", "12,345", "0.1235", "0.5000, 0.7500", "text"),
        "label a images 1,200",
    ]


def test_every_command_has_the_options_that_all_have_and_errors_show_where_if_asked(tmp_path):
    from typer.main import get_command

    from pruneforge.cli import app

    for name, command in get_command(app).commands.items():
        names = {option for parameter in command.params for option in parameter.opts}
        text = invoke(name, "--help").output
        assert "--quiet" in text, name
        assert "--debug" in text, name
        assert "--config" in names or name == "doctor"
    plain = invoke("inspect", tmp_path)
    told = invoke("inspect", tmp_path, "--debug")
    assert (plain.exit_code, told.exit_code) == (2, 2)
    assert "Traceback" not in plain.stderr
    assert told.stderr.count("Traceback") >= 1
    assert told.stderr.strip().splitlines()[-1] == plain.stderr.strip()
    assert invoke("--version").output.startswith("pruneforge 0.")


def test_long_work_says_where_it_is_where_there_is_no_terminal(checkpoint, tmp_path):
    told = shell("prune", checkpoint, *SETTINGS, "--output", tmp_path / "told", PRUNEFORGE_QUIET="")
    assert told.returncode == 0
    lines = told.stderr.strip().splitlines()
    assert [line.split("] ")[1].split(",")[0] for line in lines] == [
        "loading the model",
        "reading calibration data",
        "pruning blocks",
    ]
    assert invoke("prune", checkpoint, *SETTINGS, "--output", tmp_path / "quiet", "--quiet").stderr == ""
