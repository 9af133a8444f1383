"""Studies: every cell is a run of its own, and nothing runs twice."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import statistics
from pathlib import Path

import commands
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small_study import finished_in, read, values

import pruneforge
from pruneforge import Evaluator, Metric, PruneForgeError
from pruneforge.checkpoint.masks import load_masks
from pruneforge.plugins import loaded_plugins
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.plan import cells_of
from pruneforge.studies.report import write_report
from pruneforge.studies.run import run_study
from pruneforge.studies.study import make_study

CHECKPOINTS = Path(__file__).parents[2] / "plugins" / "pruneforge_demo" / "checkpoints"


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


def test_methods_have_patterns_and_models_of_their_own_and_models_draws(tmp_path):
    digits = values()["models"]["digits"]
    methods = {
        "magnitude": {"metric": "magnitude"},
        "wanda": {"metric": "wanda", "patterns": ["2:4"]},
        "ria": {"metric": "ria", "models": ["b"]},
    }
    models = {"a": {**digits, "seeds": [3, 4]}, "b": digits}
    asked = values(models=models, methods=methods, patterns=[0.5], seeds=[0], controls=False)
    study = make_study(asked)
    assert [cell.key for cell in cells_of(study, [])] == [
        *(f"a/{method}/{seed}" for method in ("magnitude/0.5", "wanda/2of4") for seed in (3, 4)),
        *(f"b/{method}/0" for method in ("magnitude/0.5", "wanda/2of4", "ria/0.5")),
    ]
    pruneforge.compare(asked, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "failed" not in report
    lines = [line for line in report.splitlines() if line.startswith("| ria | ")]
    assert any(line.count(" – |") == 1 for line in lines), "2:4 was not asked of it"


class Unmeasurable(Evaluator):
    """Fails for models with few weights left, and for the dense model if it is told to."""

    class Options(Evaluator.Options):
        dense: bool = False

    def evaluate(self, subject):
        if subject.made_of is None and self.options.dense:
            raise PruneForgeError("no dense model here")
        matrices = [p for p in subject.model.module.parameters() if p.dim() > 1]
        left = sum(int(p.count_nonzero()) for p in matrices) / sum(p.numel() for p in matrices)
        if left < 0.35:
            raise ZeroDivisionError("nothing left")
        return {"loss": left}


@pytest.fixture
def unmeasurable(monkeypatch):
    registry = loaded_plugins().registry
    for kind in ("evaluator", "metric"):
        monkeypatch.setitem(registry._entries, kind, dict(registry._entries[kind]))
    registry.evaluator("unmeasurable", Unmeasurable)


def test_an_evaluation_that_fails_is_one_cells_fault(tmp_path, unmeasurable):
    asked = values(patterns=[0.5, 0.9], seeds=[0], controls=False, methods={"m": {"metric": "magnitude"}})
    asked["models"]["digits"]["tasks"] = [{"task": "unmeasurable"}]
    study = make_study(asked)
    rows = write_report(study, run_study(study, tmp_path / "out"), tmp_path / "out")
    assert [(row["pattern"], row["failed"]) for row in rows] == [
        ("0.5", ""),
        ("0.9", "ZeroDivisionError: nothing left"),
    ]
    assert StudyFolder(tmp_path / "out").measured(cells_of(study, [])[0])["runs_in_the_pass"] == 2


def test_a_dense_model_that_cannot_be_evaluated_fails_its_own_cells_alone(tmp_path, unmeasurable):
    asked = values(seeds=[0], controls=False, methods={"m": {"metric": "magnitude"}}, items=False)
    other = {**asked["models"]["digits"], "tasks": [{"task": "unmeasurable", "options": {"dense": True}}]}
    study = make_study({**asked, "models": {"broken": other, **asked["models"]}})
    rows = write_report(study, run_study(study, tmp_path / "out"), tmp_path / "out")
    assert [(row["model"], row["failed"]) for row in rows] == [
        ("broken", "the dense model cannot be evaluated on unmeasurable: no dense model here"),
        ("digits", ""),
    ]


def test_a_cell_alone_is_what_it_is_among_others_in_another_dtype_too(tmp_path):
    def asked(patterns):
        made = values(patterns=patterns, seeds=[0], controls=False, methods={"s": {"metric": "sparsegpt"}})
        made["models"]["digits"] |= {"dtype": "bfloat16"}
        return make_study(made)

    run_study(asked([0.5, 0.6]), tmp_path / "both")
    run_study(asked([0.5]), tmp_path / "one")
    place = "cells/digits/s/0.5/0/cell.json"
    assert (tmp_path / "both" / place).read_bytes() == (tmp_path / "one" / place).read_bytes()
    assert json.loads((tmp_path / "one" / "dense/digits/0.json").read_text())["asked"]["dtype"] == "bfloat16"


METRIC = """
from pruneforge import Metric


class Mine(Metric):
    def score(self, layer, stats):
        return layer.weight{}
"""


def test_a_plugin_file_counts_by_what_is_in_it(tmp_path):
    (tmp_path / "mine.py").write_text(METRIC.format(".abs()"))
    (tmp_path / "other.py").write_text(METRIC.replace("Mine", "Other").format(""))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values(methods={"m": {"metric": "mine"}}, controls=False)))
    base = ("compare", tmp_path / "study.yaml", "--output", tmp_path / "out")
    first = commands.run(*base, "-p", tmp_path / "mine.py")
    assert first.returncode == 0, first.stderr
    before = finished_in(tmp_path / "out")
    wider = values(methods={"m": {"metric": "mine"}, "o": {"metric": "other"}}, controls=False)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(wider))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "elsewhere" / "mine.py")
    files = ("-p", tmp_path / "other.py", "-p", tmp_path / "elsewhere" / "mine.py")
    second = commands.run(*base, *files)
    assert second.returncode == 0, second.stderr
    after = finished_in(tmp_path / "out")
    assert len(after) == 4
    assert {key: after[key] for key in before} == before
    (tmp_path / "elsewhere" / "mine.py").write_text(METRIC.format(".square()"))
    third = commands.run(*base, *files)
    assert third.returncode == 2
    assert "is of another study: plugins mine.py was" in third.stderr


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "study.yaml").write_text("# mine")
    (tmp_path / "alike" / "cells").mkdir(parents=True)
    (tmp_path / "alike" / "results.csv").write_text("mine")
    said_of = {"file": "is no folder", "file/below": "is no folder", "full": "holds other files"}
    for place, said in (said_of | {"alike": "holds other files"}).items():
        with pytest.raises(PruneForgeError, match=said):
            run_study(make_study(values()), tmp_path / place)
    assert (tmp_path / "full" / "study.yaml").read_text() == "# mine"
    assert (tmp_path / "alike" / "results.csv").read_text() == "mine"


def test_a_model_that_has_changed_since_is_not_mixed_with_what_it_was(tmp_path):
    model, folder = shutil.copytree(CHECKPOINTS / "image", tmp_path / "model"), tmp_path / "out"
    digits = {**values()["models"]["digits"], "model": str(model)}
    asked = values(models={"digits": digits}, methods={"magnitude": {"metric": "magnitude"}}, controls=False)
    run_study(make_study({**asked, "patterns": [0.5]}), folder)
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "head.bias": weights["head.bias"] + 1}, model / "model.safetensors")
    before = sorted(folder.rglob("*"))
    with pytest.raises(PruneForgeError, match=r"model 'digits' has changed since .* was begun"):
        run_study(make_study({**asked, "patterns": [0.5, 0.6]}), folder)
    assert sorted(folder.rglob("*")) == before
    run_study(make_study({**asked, "patterns": [0.5]}), folder)  # there is nothing to run
    for place in ("cells", "dense"):
        shutil.rmtree(folder / place / "digits")
    run_study(make_study({**asked, "patterns": [0.5, 0.6]}), folder)


def test_a_model_that_is_mended_after_it_failed_is_tried_again(tmp_path, unmeasurable):
    model, folder = shutil.copytree(CHECKPOINTS / "image", tmp_path / "model"), tmp_path / "out"
    task = {"task": "unmeasurable", "options": {"dense": True}}
    digits = {**values()["models"]["digits"], "model": str(model), "tasks": [task]}
    asked = values(models={"digits": digits}, methods={"magnitude": {"metric": "magnitude"}}, controls=False)
    study = make_study({**asked, "patterns": [0.5]})
    run_study(study, folder)
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "head.bias": weights["head.bias"] + 1}, model / "model.safetensors")
    run_study(study, folder)
    assert "no dense model here" in StudyFolder(folder).dense("digits", 0)["failed"]


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
    (folder / "cells" / cells[0].key / "pruneforge.masks").unlink()
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
    assert len(ids) == 1


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
    with open(folder / "measured.csv", newline="") as file:
        (spared,) = csv.DictReader(file)
    assert (spared["method"], spared["runs_in_the_pass"]) == ("wanda", "1")
    assert "metric 'never' failed on layer" in spared["alone_because"]
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
        ({"patterns": ["3:7"]}, "model 'digits': pattern 3:7 needs inputs in groups of 7"),
        ({"patterns": [124]}, 'write N:M patterns in quotes, such as "2:4"'),
        ({"patterns": [0.5, 0.5]}, "0.5 is named twice"),
        ({"seeds": [0, 1, 0]}, "0 is named twice"),
        ({"patterns": []}, "patterns"),
        ({"methods": {"one": {"metric": "wanda", "patterns": [0.5, 0.5]}}}, "0.5 is named twice"),
        ({"methods": {"one": {"metric": "wanda", "patterns": ["3:7"]}}}, "pattern 3:7 needs inputs in groups of 7"),
        ({"methods": {"one": {"metric": "wanda", "models": ["b"]}}}, "method 'one' is for model 'b', which is not"),
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
    assert "2 of 8 cells are finished in" in part.output
    assert set(finished_in(tmp_path / "p")) == {"image/gblm/0.5/0", "image/gblm/2of4/0"}
    assert not (tmp_path / "p" / "report.html").exists()


BAD_COMMANDS = [
    (("study.yaml",), "compare needs a folder for its cells; name it with --output"),
    (("--output", "out"), "compare needs a study: a YAML file, a --preset, or models"),
    (("study.yaml", "--metric", "wanda", "--output", "out"), "--metric is for models on the command line"),
    (("study.yaml", "--seeds", "1", "--output", "out"), "--seeds is for models on the command line"),
    (("study.yaml", "--preset", "demo", "--output", "out"), "takes one file, or the name of one --preset, or models"),
    (("none.yaml", "--output", "out"), "study 'none.yaml' does not exist"),
    (("list.yaml", "--output", "out"), "study 'list.yaml' must be a mapping"),
    (("broken.yaml", "--output", "out"), "study 'broken.yaml' is not plain YAML"),
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
