"""Studies that plugins ship: listed, shown, and run by their names."""

from __future__ import annotations

import json

import commands
import pytest
import yaml

from pruneforge.plugins import loaded_plugins
from pruneforge.studies.study import make_study

SMALL = """# One cell, of seconds.
models:
  image:
    model: demo:image
    calibration: digits
    samples: 8
    tasks: [{task: imagenet, options: {data: digits, workers: 0, limit: 40}}]
methods:
  wanda: {metric: wanda}
controls: false
patterns: ["2:4"]
seeds: [0]
"""
PLUGIN = """
from pathlib import Path

from pruneforge import hookimpl


@hookimpl
def pruneforge_register(registry):
    registry.study("small", Path(__file__).with_name("small.yaml"))
"""


@pytest.fixture
def plugin(tmp_path):
    """A single file, which ships a study beside it."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path / "mine.py"


def test_a_preset_runs_and_leaves_a_study_that_can_be_edited(plugin, tmp_path):
    done = commands.invoke("compare", "--preset", "small", "--output", tmp_path / "out", "-p", plugin)
    assert done.exit_code == 0, done.output
    assert "image: top1" in done.output
    left = yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())
    assert make_study(left) == make_study(yaml.safe_load(SMALL))
    left["methods"]["magnitude"] = {"metric": "magnitude"}
    (tmp_path / "wider.yaml").write_text(yaml.safe_dump(left))
    wider = commands.invoke("compare", tmp_path / "wider.yaml", "--output", tmp_path / "out", "-p", plugin)
    assert wider.exit_code == 0, wider.output
    assert "magnitude" in wider.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--preset", "smal"), "unknown study 'smal'; did you mean 'small'?"),
        (("--preset", "small", "small.yaml"), "compare takes one file, or the name of one --preset, or models"),
    ],
)
def test_a_wrong_preset_is_one_line(plugin, tmp_path, arguments, said):
    done = commands.invoke("compare", *arguments, "--output", tmp_path / "out", "-p", plugin)
    assert (done.exit_code, done.output) == (2, f"pruneforge: {said}\n")
    assert not (tmp_path / "out").exists()


def test_a_preset_whose_file_is_gone_or_broken_is_one_line(plugin, tmp_path):
    (tmp_path / "small.yaml").write_text("models: [")
    broken = commands.invoke("compare", "--preset", "small", "--output", tmp_path / "out", "-p", plugin)
    assert (broken.exit_code, len(broken.output.splitlines())) == (2, 1)
    assert "'small' is not plain YAML" in broken.output
    (tmp_path / "small.yaml").unlink()
    gone = commands.invoke("compare", "--preset", "small", "--output", tmp_path / "out", "-p", plugin)
    assert (gone.exit_code, len(gone.output.splitlines())) == (2, 1)
    assert f"study 'small' of plugin '{plugin}' cannot be read from" in gone.output


def test_studies_are_listed_with_their_first_line_and_shown_by_name(plugin):
    listed = " ".join(commands.invoke("plugins", "-p", plugin).output.split())
    for study in loaded_plugins().registry.files("study"):
        assert f"│ {study.name} " in listed
    assert "One cell, of seconds." in listed
    assert commands.invoke("plugins", "small", "-p", plugin).output == SMALL
    found = json.loads(commands.invoke("plugins", "--json", "small", "-p", plugin).output)
    assert found["studies"] == [{"name": "small", "plugin": str(plugin), "summary": "One cell, of seconds."}]
    assert found["registered"] == []
