"""Studies: every cell is a run of its own, nothing runs twice, and the report says what the cells say."""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path

import commands
import pytest
import yaml

import pruneforge
from pruneforge import Metric, PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.studies import run as running
from pruneforge.studies.report import as_latex, as_markdown, tables_of, write_report
from pruneforge.studies.results import interval, summaries
from pruneforge.studies.run import StudyFolder, run_study
from pruneforge.studies.study import make_study


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


def test_a_stopped_study_goes_on_with_what_is_missing_and_ends_in_the_same_bytes(unbroken, tmp_path, monkeypatch):
    study, folder, finish = make_study(values()), tmp_path / "out", running._finish
    made = []

    def stopping(cell, *more):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(cell.key)
        finish(cell, *more)

    monkeypatch.setattr(running, "_finish", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, folder)
    monkeypatch.setattr(running, "_finish", lambda cell, *more: (made.append(cell.key), finish(cell, *more)))
    write_report(study, run_study(study, folder), folder)
    assert len(made) == len(set(made)) == 8
    for name in ("results.csv", "results.json", "report.html", "report.md", "report.tex", "study.yaml"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert not (folder / "work").exists()


def test_what_is_added_later_runs_alone(unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    first = make_study(values(controls=False, seeds=[0]))
    run_study(first, folder)
    made, finish = [], running._finish
    monkeypatch.setattr(running, "_finish", lambda cell, *more: (made.append(cell.key), finish(cell, *more)))
    more = {**values()["methods"], "recovered": {"metric": "magnitude", "recover": "ridge"}}
    wider = make_study(values(controls=False, seeds=[0], methods=more))
    run_study(wider, folder)
    assert made == ["digits/recovered/2of4/0"]
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


def row(method, seed, value, pattern="0.5"):
    return {"model": "m", "task": "t", "method": method, "pattern": pattern, "seed": seed, "value": value} | {
        "loss_increase": None,
        "measure": "perplexity",
        "higher_is_better": False,
        "share": False,
        "dense": 5.0,
        "samples": 8,
        "seqlen": 64,
        "calibration": "c4",
        "propagate": "dense",
        "failed": "",
    }


ROWS = [row("a", seed, value) for seed, value in enumerate((10.0, 11.0, 12.0))]
ROWS += [row("b_2", seed, value) for seed, value in enumerate((9.0, 9.5, 10.9))]
ROWS += [row("c", seed, value) for seed, value in enumerate((10.2, 10.9, 11.9))]


def test_draws_are_compared_pairwise():
    base, other, same = summaries(ROWS, "a")
    assert (base.mean, base.deviation) == (11.0, 1.0)
    assert base.difference is None
    assert other.difference == pytest.approx(statistics.fmean([-1, -1.5, -1.1]))
    assert other.deviation == pytest.approx(statistics.stdev([9.0, 9.5, 10.9]))
    assert -1.5 <= other.low <= other.difference <= other.high <= -1
    assert other.high < 0
    assert same.low <= 0 <= same.high
    assert interval([3.0]) == (None, None)
    assert interval([2.0, 2.0]) == (2.0, 2.0)


def test_nothing_is_bold_inside_the_noise():
    (table,) = tables_of(ROWS, "a")
    assert table.best == {"0.5": {"b_2"}}
    (close,) = tables_of([*ROWS[:3], *ROWS[6:]], "a")
    assert close.best == {"0.5": {"a", "c"}}
    (single,) = tables_of([row("a", 0, 10.0), row("c", 0, 9.0)], "a")
    assert single.best == {"0.5": set()}
    assert "| b_2 | **9.80 ± 0.98** |" in as_markdown([table], "a")
    assert r"b\_2 & \textbf{$9.80\pm 0.98$} \\" in as_latex([table])


def test_the_page_holds_everything_that_it_shows(unbroken):
    page = (unbroken / "report.html").read_text()
    assert not re.search(r"(src|href)=|@import|url\(", page.replace("xlink:href", ""))
    for text in ("digits: top1, imagenet", "gradients", "random", "wanda (baseline)", "Structure of the masks"):
        assert text in page
    assert page.count("<table") == page.count("</table>") == 2
    assert "<svg" not in page  # one sparsity makes no curve
    rows = json.loads((unbroken / "results.json").read_text())
    assert {row["recipe"] for row in rows} == {row["recipe"] for row in read(unbroken)}
    assert all(row["mask_rows"] == 0 for row in rows if row["scope"] == "row")


def test_the_command_runs_a_study(tmp_path):
    file = tmp_path / "study.yaml"
    asked = values(methods={"magnitude": {"metric": "magnitude"}}, controls=False, patterns=[0.3, 0.6], seeds=[0])
    file.write_text(yaml.safe_dump(asked))
    done = commands.invoke("compare", file, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "digits: top1" in done.output
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 1
    assert StudyFolder(tmp_path / "out").dense("digits", 0)["top1"] > 0.8
    for arguments, said in (
        (("compare", file), "a study needs a folder for its cells; name it with --output"),
        (("compare", file, "--output", tmp_path / "o", "--metric", "wanda"), "is for a list of models"),
        (("compare", tmp_path / "none.yaml", "--output", tmp_path / "o"), "cannot be read"),
    ):
        refused = commands.invoke(*arguments)
        assert refused.exit_code == 2
        assert said in refused.output
