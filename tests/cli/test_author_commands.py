"""What authors of plugins type: `pruneforge new` and `pruneforge check`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from commands import invoke

KINDS = ["metric", "allocator", "refiner", "recovery", "objective", "adapter", "source", "evaluator", "observer"]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in ("metric", "evaluator")]


@pytest.mark.parametrize("kind", ["metric", "evaluator", *SLOW])
def test_a_new_plugin_works_and_its_tests_pass_at_once(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"fresh_{kind}"
    done = invoke("new", kind, name)
    assert done.exit_code == 0, done.output
    folder = tmp_path / name
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
    tested = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout
    assert "passed" in tested.stdout
    assert f'\n{name} = "pruneforge_{name}"\n' in (folder / "pyproject.toml").read_text()
    done = invoke("new", kind, f"single{kind}", "--single-file")
    assert done.exit_code == 0, done.output
    checked = invoke(
        "plugins" if kind in ("objective", "observer") else "check", f"single{kind}", "-p", f"single{kind}.py"
    )
    assert checked.exit_code == 0, checked.output
    assert f"single{kind}" in checked.output
    for wrong, said in (
        ((kind, name), "is there already; name another place with --output"),
        ((kind, "Not-A-Name"), "cannot be a plugin's name"),
        (("metrik", "x"), "metric"),
        ((kind, "nowhere", "--output", tmp_path / f"single{kind}.py" / "below"), "cannot be written"),
    ):
        done = invoke("new", *wrong)
        assert (done.exit_code, said in done.output) == (2, True), done.output


def test_check_prints_what_a_plugin_breaks_and_says_so_by_its_exit_code(tmp_path):
    done = invoke("check", "wanda")
    assert done.exit_code == 0, done.output
    assert re.search(r"wanda: (\d+) of \1 checks pass", done.output), done.output
    assert "left out: torch sees no CUDA device" in done.output or torch.cuda.is_available()
    file = tmp_path / "unsteady.py"
    file.write_text(
        "from pruneforge import Gram, Metric\n"
        "class Unsteady(Metric):\n"
        "    requires = (Gram,)\n"
        "    def score(self, layer, stats):\n"
        "        return layer.weight.abs()\n"
    )
    done = invoke("check", "unsteady", "-p", file)
    assert done.exit_code == 1
    assert "Gram is required and not used" in done.output
    results = json.loads(invoke("check", "unsteady", "-p", file, "--json").output)
    assert [result["check"] for result in results if result["error"]] == ["the statistics required are used"]
    done = invoke("check", "unstead")
    assert (done.exit_code, "did you mean 'unsteady'" in done.output) == (2, True)


def test_check_says_what_a_plugin_needs_and_which_kinds_it_can_check(tmp_path):
    done = invoke("check", "text")
    assert (done.exit_code, "needs: --option path=VALUE" in done.output) == (2, True), done.output
    file = tmp_path / "words.txt"
    file.write_text("some words of a text, one after another. " * 40)
    done = invoke("check", "text", "--option", f"path={file}")
    assert done.exit_code == 0, done.output
    file = tmp_path / "flat.py"
    file.write_text(
        "from pruneforge import Objective\n"
        "class Flat(Objective):\n"
        "    def losses(self, output, batch):\n"
        "        return output.logits.mean((1, 2))\n"
    )
    done = invoke("check", "flat", "-p", file)
    assert (done.exit_code, "there are no checks of objective 'flat'" in done.output) == (2, True), done.output
