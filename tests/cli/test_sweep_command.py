"""`pruneforge sweep` as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import invoke
from safetensors.torch import load_file, save_file

DATA = ("--calibration", "python-docs", "--samples", 4, "--seqlen", 64)
TASK = ("--task", "perplexity", "--data", "python-docs", "--window", 64, "--limit", 2)


def test_a_sweep_goes_on_where_it_stopped_and_states_the_rule(tmp_path):
    out = tmp_path / "out"
    common = ("sweep", "demo:text", "--metric", "magnitude", "--metric", "wanda", *DATA, *TASK, "--output", out)
    common += ("--option", "wanda.scope=layer", "--no-controls", "--loss-increase", 0.1)
    common += ("--pattern", "none", "--from", 0.3, "--step", 0.3)
    done = invoke(*common, "--to", 0.6)
    assert done.exit_code == 0, done.output
    assert "have a loss at most 10% above the dense model's" in done.output
    assert [line.split()[0] for line in done.output.splitlines() if "%" in line and "." in line][:2] == ["30%", "60%"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("cell.json")}
    assert len(before) == 4
    assert json.loads((out / "cells/text/wanda/0.3/0/cell.json").read_text())["scope"] == "layer"
    done = invoke(*common, "--to", 0.9, "--json")
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 6
    assert found["rule"] == {"points": 1.0, "loss_increase": 0.1}
    assert {knee["method"] for knee in found["knees"]} == {"magnitude", "wanda"}
    assert {"sweep.html", "sweep.md", "sweep.json", "sweep-text-perplexity.svg", "report.html"} <= {
        path.name for path in out.iterdir()
    }


def test_masks_of_several_models_are_compared(checkpoint, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(checkpoint, tuned)
    tensors = load_file(tuned / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tuned / "model.safetensors", {"format": "pt"})
    asked = ("--metric", "magnitude", *TASK, "--from", 0.4, "--to", 0.4, "--pattern", "2:4", "--no-controls")
    done = invoke("sweep", "demo:text", tuned, *asked, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "text and tuned: similarity of masks" in done.output
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())["similarity"]
    assert [(each["pattern"], each["jaccard"], each["same"]) for each in found] == [("0.4", 1, 1), ("2:4", 1, 1)]


BAD = [
    (("--from", 0.9, "--to", 0.5), "--from 0.9 is above --to 0.5"),
    (("--to", 1), "--to 1.0 is outside [0, 1)"),
    (("--step", 0), "--step 0.0 must lie between 0 and 1"),
    (("--metric", "wandas"), "unknown metric 'wandas'; did you mean 'wanda'?"),
    (("--option", "alpha=1"), "unknown option of wanda 'alpha'"),
    (("--pattern", "3:7"), "pattern 3:7 needs inputs in groups of 7"),
    (("--pattern", "half"), "pattern 'half' is neither"),
    (("--seeds", "one"), "'one' is not whole numbers with commas between"),
    (("--points", -1), "--points -1.0 must be a number from 0 on"),
    (("--task", "perplexty"), "unknown evaluator 'perplexty'; did you mean 'perplexity'?"),
    (("--calibration", "missing.txt"), "there is no file or folder 'missing.txt'"),
    (("--allocator", "owls"), "unknown allocator 'owls'; did you mean 'owl'?"),
    (("--propagate", "dense"), "No such option: --propagate"),
]


@pytest.mark.parametrize(("wrong", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_bad_input_is_one_clear_line_before_anything_runs(wrong, said, tmp_path):
    given = {"--metric": "wanda", "--calibration": "python-docs", "--task": "perplexity"} | dict([wrong[:2]])
    given |= dict(zip(wrong[2::2], wrong[3::2], strict=True))
    options = [part for pair in given.items() for part in pair]
    done = invoke("sweep", "demo:text", *options, "--data", "python-docs", "--output", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1, done.output
    assert list(tmp_path.iterdir()) == []
