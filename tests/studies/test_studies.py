"""Studies: every cell is a run of its own, and nothing runs twice."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import yaml
from conftest import CHECKPOINT
from PIL import Image

import pruneforge
from pruneforge import Metric, PruneForgeError
from pruneforge.checkpoint.masks import load_masks
from pruneforge.plugins import loaded_plugins
from pruneforge.studies import cells as cells_module
from pruneforge.studies.executors import make_executor
from pruneforge.studies.folder import CELL_FILE, StudyFolder
from pruneforge.studies.report import write_report
from pruneforge.studies.run import chosen_cells, run_study
from pruneforge.studies.study import cells_of, make_study


def values(**changes):
    return {
        "models": {
            "digits": {
                "model": "demo:image",
                "calibration": "digits",
                "samples": 8,
                "tasks": [{"task": "imagenet", "options": {"data": "digits", "workers": 0, "limit": 40}}],
            }
        },
        "methods": {"wanda": {"metric": "wanda"}, "gradients": {"metric": "gblm", "options": {"alpha": 10}}},
        "patterns": ["2:4"],
        "seeds": [0, 1],
        **changes,
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    study = make_study(values())
    write_report(study, run_study(study, folder), folder)
    return folder


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_is_what_a_run_of_its_own_gives(unbroken):
    rows = read(unbroken)
    assert len(rows) == 4 * 2  # with the two controls
    assert {row["method"] for row in rows} == {"wanda", "gradients", "magnitude", "random"}
    row = next(each for each in rows if (each["method"], each["pattern"], each["seed"]) == ("gradients", "2:4", "1"))
    alone = pruneforge.prune(
        "demo:image", "gblm", None, "2:4", "digits", samples=8, seed=1, options={"alpha": 10}, propagate="dense"
    )
    found = pruneforge.evaluate(alone, "imagenet", data="digits", workers=0, limit=40)
    assert float(row["value"]) == found["top1"]
    assert float(row["loss"]) == found["loss"]
    assert float(row["sparsity"]) == alone.report["sparsity"]["reached"]
    dense = pruneforge.evaluate("demo:image", "imagenet", data="digits", workers=0, limit=40)
    assert float(row["dense"]) == dense["top1"]
    assert float(row["loss_increase"]) == pytest.approx(found["loss"] / dense["loss"] - 1)


def kept(folder: Path) -> dict[str, bytes]:
    """Return everything in a study's folder but times and memory."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "measured" not in name and name != ".lock"}


def finished_in(folder: Path) -> dict[str, int]:
    """When each cell was finished, by its key."""
    cells = folder / "cells"
    return {str(path.parent.relative_to(cells)): path.stat().st_mtime_ns for path in cells.rglob(CELL_FILE)}


def test_a_killed_study_goes_on_with_what_is_missing_and_ends_in_the_same_bytes(unbroken, tmp_path):
    folder, file = tmp_path / "out", tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values(), sort_keys=False))
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_FIVE, str(file), str(folder)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = finished_in(folder)
    assert len(before) == 5
    assert list(folder.glob(".work-*/pass"))  # which nobody was left to remove
    study = make_study(values())
    write_report(study, run_study(study, folder), folder)
    after = finished_in(folder)
    assert len(after) == 8
    assert {key: after[key] for key in before} == before
    assert kept(folder) == kept(unbroken)


KILLED_AFTER_FIVE = """
import os, signal, sys, yaml
from pathlib import Path
from pruneforge.studies.folder import CELL_FILE, StudyFolder
from pruneforge.studies.run import run_study
from pruneforge.studies.study import cells_of, make_study

keep, kept = StudyFolder.keep, []

def keeping(self, place, content):
    kept.extend([place] if place.endswith(CELL_FILE) else [])
    if len(kept) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, place, content)

StudyFolder.keep = keeping
run_study(make_study(yaml.safe_load(open(sys.argv[1]))), Path(sys.argv[2]))
"""


def test_several_processes_leave_the_same_files(unbroken, tmp_path):
    study, folder = make_study(values()), tmp_path / "out"
    write_report(study, run_study(study, folder, executor=make_executor("local", workers=2)), folder)
    assert kept(folder) == kept(unbroken)


@pytest.fixture
def new_ray(monkeypatch):
    """A cluster of this test's own, which leaves nothing behind; its sockets need a short path."""
    pytest.importorskip("ray", reason="ray is not installed (pip install '.[ray]')")
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        for name, value in {"TMPDIR": folder, "AUTH_MODE": "disabled", "USAGE_STATS_ENABLED": "0"}.items():
            monkeypatch.setenv(f"RAY_{name}", value)
        yield


@pytest.mark.slow
def test_a_ray_cluster_leaves_the_same_files(unbroken, tmp_path, new_ray):
    study, folder = make_study(values()), tmp_path / "out"
    write_report(study, run_study(study, folder, executor=make_executor("ray", num_cpus=0.5)), folder)
    assert kept(folder) == kept(unbroken)
    with pytest.raises(PruneForgeError, match=r"no Ray cluster at '127\.0\.0\.1:1': .*refused"):
        run_study(study, tmp_path / "other", executor=make_executor("ray", address="127.0.0.1:1"))


def test_a_wrong_executor_is_one_line():
    for name, options, said in (
        ("slurm", {}, "unknown executor 'slurm'"),
        ("local", {"workers": 0}, "option workers=0 of local"),
        ("local", {"address": "here"}, "unknown option of local 'address'"),
    ):
        with pytest.raises(PruneForgeError, match=said):
            make_executor(name, **options)


def test_a_pass_makes_as_many_models_as_the_disk_has_room_for(unbroken, tmp_path, monkeypatch):
    study, folder = make_study(values()), tmp_path / "out"
    size = sum(path.stat().st_size for path in (CHECKPOINT.parent / "image").glob("*.safetensors"))
    little = shutil._ntuple_diskusage(10 * size, 6 * size, 4 * size)  # three models at 80 %
    monkeypatch.setattr(cells_module, "shutil", SimpleNamespace(rmtree=shutil.rmtree, disk_usage=lambda _: little))
    cells = run_study(study, folder)
    together = [StudyFolder(folder).measured(cell)["runs_in_the_pass"] for cell in cells if cell.seed == 0]
    assert together == [3, 3, 3, 1]
    write_report(study, cells, folder)
    assert kept(folder) == kept(unbroken)


def test_parts_of_a_study_run_apart_and_make_it_together(unbroken, tmp_path):
    study, folder = make_study(values()), tmp_path / "out"
    for part in ("2/2", "1/2"):
        cells = run_study(study, folder, only=[part])
    assert {key.split("/")[-1] for key in finished_in(folder)} == {"0", "1"}
    write_report(study, cells, folder)
    assert kept(folder) == kept(unbroken)
    by_name = [cell.key for cell in chosen_cells(cells, ["*/wanda/*/1", "digits/random/*"])]
    assert by_name == ["digits/wanda/2of4/1", "digits/random/2of4/0", "digits/random/2of4/1"]
    parts = [cell.key for part in ("1/3", "2/3", "3/3") for cell in chosen_cells(cells, [part])]
    assert sorted(parts) == sorted(cell.key for cell in cells)
    for asked, said in (("0/3", "from 1 to 3"), ("4/3", "from 1 to 3"), ("text/*", "names none")):
        with pytest.raises(PruneForgeError, match=said):
            chosen_cells(cells, [asked])


def test_what_is_kept_of_each_cell(unbroken, tmp_path):
    study, folder = make_study(values(controls=False, keep_masks=True, items=False)), tmp_path / "out"
    cells = run_study(study, folder)
    held = StudyFolder(folder)
    for cell in cells:
        found = held.cell(cell)
        masks = load_masks(folder / "cells" / cell.key)
        assert {name: 1 - float(mask.double().mean()) for name, mask in masks.items()} == found["masks"]["layers"]
        assert held.items(cell, 0) is None
        assert ("details" in found) == ("picture" in found) == (cell.seed == 0)
    of_first = held.cell(cells[0])
    assert set(of_first["details"]) == set(of_first["masks"]["layers"])
    picture = of_first["picture"]
    image = Image.open(io.BytesIO(base64.b64decode(picture["png"])))
    mask = load_masks(folder / "cells" / cells[0].key)[picture["layer"]]
    rows, columns = picture["shape"]
    assert image.size == (columns, rows)
    assert (np.asarray(image) == mask[:rows, :columns].numpy()).all()
    made = finished_in(folder)
    (folder / "cells" / cells[0].key / "masks.safetensors").unlink()
    run_study(study, folder)
    assert [key for key, when in finished_in(folder).items() if when != made[key]] == [cells[0].key]


def test_the_outcome_of_each_item_is_kept_and_its_mean_is_the_measure(unbroken):
    cells = cells_of(make_study(values()), [])
    held = StudyFolder(unbroken)
    ids = set()
    for cell in cells:
        items = held.items(cell, 0)
        assert items["measure"] == "top1"
        assert statistics.fmean(items["values"]) == held.cell(cell)["evaluations"][0]["top1"]
        ids.add(items["ids"])
    dense = json.loads((unbroken / "dense" / "digits" / "items-0.json").read_text())
    assert statistics.fmean(dense["values"]) == held.dense("digits", 0)["top1"]
    assert ids == {dense["ids"]}


def test_a_method_may_see_other_data(tmp_path):
    asked = {"few": {"metric": "wanda", "samples": 4}, "pruned": {"metric": "wanda", "propagate": "pruned"}}
    cells = run_study(make_study(values(methods=asked, controls=False, seeds=[0], details=False)), tmp_path / "out")
    assert [(cell.recipe.samples, cell.recipe.propagate) for cell in cells] == [(4, "dense"), (8, "pruned")]
    for cell, settings in zip(cells, ({"samples": 4, "propagate": "dense"}, {"samples": 8}), strict=True):
        alone = pruneforge.prune("demo:image", "wanda", None, "2:4", "digits", **settings)
        found = pruneforge.evaluate(alone, "imagenet", data="digits", workers=0, limit=40)
        assert StudyFolder(tmp_path / "out").cell(cell)["evaluations"][0]["loss"] == found["loss"]


def test_what_is_added_later_runs_alone(tmp_path):
    folder = tmp_path / "out"
    first = make_study(values(controls=False, seeds=[0]))
    run_study(first, folder)
    before = finished_in(folder)
    more = {**values()["methods"], "recovered": {"metric": "magnitude", "recover": "ridge"}}
    wider = make_study(values(controls=False, seeds=[0], methods=more))
    run_study(wider, folder)
    after = finished_in(folder)
    assert after.keys() - before.keys() == {"digits/recovered/2of4/0"}
    assert {key: after[key] for key in before} == before
    changed = values(controls=False, seeds=[0])
    changed["methods"]["gradients"]["options"] = {"alpha": 20}
    with pytest.raises(PruneForgeError, match="is of another study: recipe options alpha was 10 and is 20 now"):
        run_study(make_study(changed), folder)


class Never(Metric):
    def score(self, layer, stats):
        raise ValueError("not today")


def test_a_cell_that_fails_says_why_and_the_rest_goes_on(tmp_path, monkeypatch):
    registry = loaded_plugins().registry
    monkeypatch.setitem(registry._entries, "metric", dict(registry._entries["metric"]))
    registry.metric("never", Never)
    study = make_study(
        values(methods={"wanda": {"metric": "wanda"}, "never": {"metric": "never"}}, seeds=[0], controls=False)
    )
    folder = tmp_path / "out"
    rows = write_report(study, run_study(study, folder), folder)
    failed = [row for row in rows if row["failed"]]
    assert [row["method"] for row in failed] == ["never"]
    assert all("metric 'never' failed on layer" in row["failed"] for row in failed)
    assert [row["method"] for row in rows if not row["failed"]] == ["wanda"]
    assert "not today" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"methods": {"one": {"metric": "wanda"}, "two": {"metric": "wand"}}},
            "cell digits/two/2of4/0: unknown metric 'wand'",
        ),
        ({"methods": {"one": {"metric": "gblm", "options": {"alfa": 1}}}}, "unknown option of gblm 'alfa'"),
        ({"methods": {"one": {"metrik": "wanda"}}}, r"methods\.one\.metric: Field required"),
        ({"methods": {"../one": {"metric": "wanda"}}}, "cannot be part of a folder's name"),
        ({"methods": {"..": {"metric": "wanda"}}}, "'..' cannot be part of a folder's name"),
        ({"patterns": ["2:4:8"]}, "2:4:8"),
        ({"patterns": []}, "patterns"),
        ({"baseline": "gblm"}, "baseline 'gblm' is not among the methods"),
        ({"models": {}}, "models"),
        ({"wrong": 1}, "wrong: Extra inputs are not permitted"),
    ],
)
def test_everything_is_checked_before_the_first_cell(changes, said, tmp_path):
    with pytest.raises(PruneForgeError, match=said):
        run_study(make_study(values(**changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_or_evaluator_is_found_before_the_first_cell(tmp_path):
    for changes, said in (
        ({"model": str(tmp_path / "none")}, "does not exist"),
        ({"tasks": [{"task": "imagent"}]}, "imagenet"),
    ):
        second = {**values()["models"]["digits"], **changes}
        study = make_study(values(models={**values()["models"], "second": second}))
        with pytest.raises(PruneForgeError, match=f"model 'second': .*{said}"):
            run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_runs_a_study(tmp_path):
    file = tmp_path / "study.yaml"
    asked = values(methods={"magnitude": {"metric": "magnitude"}}, controls=False, patterns=[0.3, 0.6], seeds=[0])
    file.write_text(yaml.safe_dump(asked))
    done = commands.invoke("compare", file, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "digits: top1" in done.output
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") >= 1
    assert StudyFolder(tmp_path / "out").dense("digits", 0)["top1"] > 0.8


def test_models_on_the_command_line_are_a_study_too(tmp_path):
    given = ("demo:image", "--metric", "wanda", "--metric", "gblm", "--option", "gblm.alpha=10", "--samples", 8)
    given += ("--calibration", "digits", "--task", "imagenet:digits", "--limit", 40, "--task-option", "workers=0")
    given += ("--pattern", "2:4", "--sparsity", 0.5, "--seeds", "0,1", "--no-controls")
    done = commands.invoke("compare", *given, "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    cells = {(row["method"], row["pattern"], row["seed"]) for row in json.loads(done.stdout)}
    assert cells == {(method, p, seed) for method in ("wanda", "gblm") for p in ("0.5", "2:4") for seed in (0, 1)}
    again = pruneforge.compare(tmp_path / "out" / "study.yaml", tmp_path / "out")
    assert again == json.loads(done.stdout)
    study = tmp_path / "out" / "study.yaml"
    part = commands.invoke("compare", study, "--cells", "*/gblm/*/0", "--output", tmp_path / "p")
    assert part.exit_code == 0, part.output
    assert "2 of 8 cells are in" in part.output
    assert set(finished_in(tmp_path / "p")) == {"image/gblm/0.5/0", "image/gblm/2of4/0"}
    assert not (tmp_path / "p" / "report.html").exists()


BAD_COMMANDS = [
    (("study.yaml",), "compare needs a folder for its cells; name it with --output"),
    (("--output", "out"), "compare needs a study: a YAML file, a --preset, or models"),
    (("study.yaml", "--metric", "wanda", "--output", "out"), "--metric is for models on the command line"),
    (("study.yaml", "--seeds", "1", "--output", "out"), "--seeds is for models on the command line"),
    (("study.yaml", "--preset", "demo", "--output", "out"), "takes one file, or the name of one --preset, or models"),
    (("none.yaml", "--output", "out"), "study 'none.yaml' cannot be read"),
    (("list.yaml", "--output", "out"), "study 'list.yaml' must be a mapping"),
    (("broken.yaml", "--output", "out"), "study 'broken.yaml' cannot be read"),
    (("demo:image", "--task", "imagenet:digits", "--output", "out"), "models on the command line need a --metric"),
    (("demo:image", "--metric", "wanda", "--output", "out"), "models on the command line need a --task"),
    (("study.yaml", "--executor", "slurm", "--output", "out"), "unknown executor 'slurm'"),
    (("study.yaml", "--num-cpus", 2, "--output", "out"), "unknown option of local 'num_cpus'"),
    (("study.yaml", "--cells", "5/4", "--output", "out"), "parts are numbered from 1 to 4"),
]


@pytest.mark.parametrize(("given", "said"), BAD_COMMANDS, ids=[said[:30] for _, said in BAD_COMMANDS])
def test_a_wrong_command_is_one_line_and_leaves_nothing(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(values()))
    Path("list.yaml").write_text("- model: demo:image")
    Path("broken.yaml").write_text("models: [")
    refused = commands.invoke("compare", *given)
    assert refused.exit_code == 2, refused.output
    assert said in refused.output
    assert len(refused.output.strip().splitlines()) == 1
    assert not Path("out").exists()
