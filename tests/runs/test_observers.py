"""Observers log each run, what they are told is true, and none of them decides anything about it."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import pytest
from conftest import interrupted_after, outcome, tiny_llama

import pruneforge
from pruneforge import Metric, PruneForgeError
from pruneforge.plugins import loaded_plugins

RECORDER = '''
import json
import random
from pathlib import Path

from pydantic import Field

from pruneforge import Observer


class Recorder(Observer):
    """Appends what it is told to a file."""

    class Options(Observer.Options):
        file: Path = Field(description="where to")
        fails: str = Field("", description="at what it fails")
        folder: Path | None = Field(None, description="what to look into at the end")

    def start(self, name, config):
        self.run = name
        self.write("start", dict(config))

    def log(self, step, values):
        self.write("log", [step, dict(values)])

    def close(self, summary):
        self.write("close", summary)
        if self.options.folder is not None:
            kept = [path for path in self.options.folder.rglob("*") if path.is_file()]
            self.write("kept", {path.name: path.stat().st_size for path in kept})

    def write(self, what, told):
        random.seed()  # as a library might
        print("looks like a result")
        if what in self.options.fails:
            raise ConnectionError(f"no way to {what}")
        with open(self.options.file, "a") as file:
            file.write(json.dumps([self.run, self.options.project, what, told]) + "\\n")
'''


@pytest.fixture
def recorder(tmp_path) -> Path:
    """A plugin's file, loaded."""
    file = tmp_path / "recorder.py"
    file.write_text(RECORDER)
    loaded_plugins().load_file(file)
    return file


def told(file: Path) -> list[list[object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prune(output, log, metric="wanda", observe_options=(), **more):
    """Prune the demo's text model by 0.6, recorded in `log` if there is one."""
    settings = {"samples": 4, "seqlen": 32, "output": output, **more}
    if log is not None:
        settings |= {"observe": "recorder", "observe_options": {"file": log, **dict(observe_options)}}
    return pruneforge.prune("demo:text", metric, 0.6, None, "python-docs", **settings)


class Never(Metric):
    def score(self, layer, stats):
        raise ValueError("not today")


def test_an_observer_is_told_the_recipe_each_block_and_the_result(recorder, tmp_path, capsys):
    result = prune(tmp_path / "out", tmp_path / "log", options={"scope": "layer"}, exclude=["*.o_proj", "*.k_proj"])
    first, *blocks, last = told(tmp_path / "log")
    assert first[:3] == ["out", "pruneforge", "start"]
    recipe = result.report["recipe"]
    assert {first[3][name] for name in ("metric", "options/scope", "exclude")} == {
        "wanda",
        "layer",
        "*.o_proj, *.k_proj",
    }
    assert first[3]["samples"] == recipe["samples"] == 4
    assert "allocator" not in first[3]
    for index, (_, _, what, (step, values)) in enumerate(blocks):
        masks = [mask for name, mask in result.masks.items() if f".layers.{index}." in name]
        zeros = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        assert (what, step, values["block/notes"]) == ("log", index, 0)
        assert values["block/sparsity"] == pytest.approx(zeros, abs=1e-12)
    assert len(blocks) == len({name.split(".")[2] for name in result.masks})
    assert last[2] == "close"
    assert last[3]["run/sparsity"] == result.report["sparsity"]["reached"]
    assert last[3]["run/seconds/total"] == result.report["measured"]["seconds"]["total"]
    assert last[3]["run/peak_memory/host_bytes"] == result.report["measured"]["peak_memory"]["host_bytes"]
    assert "looks like a result" not in capsys.readouterr().out


def test_a_run_gives_the_same_bytes_with_an_observer(recorder, tmp_path):
    prune(tmp_path / "with", tmp_path / "log", "random", recover="reconstruct")
    prune(tmp_path / "without", None, "random", recover="reconstruct")
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


def test_a_model_in_memory_is_logged_by_metric_and_pattern(recorder, tmp_path):
    model = tiny_llama()
    more = {"observe": ["recorder:mine"], "observe_options": {"file": tmp_path / "log"}}
    pruneforge.prune(model, "magnitude", None, "2:4", **more)
    lines = told(tmp_path / "log")
    assert {(line[0], line[1]) for line in lines} == {("magnitude-2:4", "mine")}
    assert [line[2] for line in lines] == ["start", "log", "log", "log", "close"]
    with pytest.raises(PruneForgeError, match="not today"):
        pruneforge.prune(model, Never(), 0.5, **more)
    assert [line[2:] for line in told(tmp_path / "log")[5:]][1:] == [["close", None]]


@pytest.mark.parametrize("given", [None, "llama"])
def test_runs_of_one_pass_are_logged_each_by_its_own_name(given, recorder, tmp_path):
    options = {"file": tmp_path / "log", "name": given}
    settings = {"samples": 4, "seqlen": 32, "observe": "recorder", "observe_options": options}
    pruneforge.prune_each("demo:text", "wanda", [0.5, "2:4"], "python-docs", output=tmp_path / "out", **settings)
    by_run: dict[str, list[str]] = {}
    for line in told(tmp_path / "log"):
        by_run.setdefault(str(line[0]), []).append(str(line[2]))
    before = given or "out"
    assert list(by_run) == [f"{before}-0.5", f"{before}-2of4"]
    assert all(events[0] == "start" and events[-1] == "close" for events in by_run.values())
    assert len({tuple(events) for events in by_run.values()}) == 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_everything_is_written_before_a_log_is_closed(in_memory, recorder, tmp_path):
    out = tmp_path / "out"
    options = {"file": tmp_path / "log", "folder": out}
    if in_memory:
        more = {"observe": "recorder", "observe_options": options, "output": out}
        pruneforge.prune(tiny_llama(), "magnitude", 0.5, **more)
    else:
        prune(out, tmp_path / "log", observe_options=options)
    close, kept = [line[2:] for line in told(tmp_path / "log")][-2:]
    assert close[0] == "close"
    assert {"pruneforge.json", "recipe.yaml", "pruneforge.masks", "model.safetensors"} <= set(kept[1])
    assert kept[1] == {path.name: path.stat().st_size for path in out.iterdir()}  # so no journal any more


@pytest.mark.parametrize("fails", ["log", "close"])
def test_one_that_fails_ends_no_run_and_is_reported_once(fails, recorder, tmp_path):
    prune(tmp_path / "out", tmp_path / "log", observe_options={"fails": fails})
    where = "at block 1 of 5" if fails == "log" else "at the end"
    said = f"observer 'recorder' failed {where}: ConnectionError: no way to {fails}; "
    report = json.loads((tmp_path / "out" / "pruneforge.json").read_text())
    assert report["warnings"] == [said + "the rest of the run is not logged there"]
    events = [line[2:] for line in told(tmp_path / "log")]
    assert events[0][0] == "start"
    assert events[1:] == [["close", None]] if fails == "log" else [line[0] for line in events[1:]] == ["log"] * 5


def test_one_that_cannot_start_ends_the_run_before_anything_is_written(recorder, tmp_path):
    with pytest.raises(PruneForgeError) as error:
        prune(tmp_path / "out", tmp_path / "log", observe_options={"fails": "start"})
    assert str(error.value) == "observer 'recorder' failed to start: ConnectionError: no way to start"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "log").exists()


def test_an_interrupted_run_is_closed_without_a_summary_and_its_continuation_logs_the_rest(recorder, tmp_path):
    with interrupted_after(1):
        prune(tmp_path / "out", tmp_path / "log")
    assert [line[2] for line in told(tmp_path / "log")] == ["start", "log", "log", "close"]
    assert told(tmp_path / "log")[-1][3] is None
    prune(tmp_path / "out", tmp_path / "again", resume=True)
    lines = told(tmp_path / "again")
    steps = [line[3][0] for line in lines if line[2] == "log"]
    assert steps == list(range(steps[0], 5))
    assert steps[0] in (1, 2)
    assert lines[-1][3]["run/sparsity"] == pytest.approx(0.6, abs=0.01)
    prune(tmp_path / "out", tmp_path / "finished", resume=True)
    assert not (tmp_path / "finished").exists()


def test_what_is_wrong_shows_before_the_model_is_looked_for(recorder, monkeypatch):
    registry = loaded_plugins().registry
    monkeypatch.setitem(registry._entries, "observer", dict(registry._entries["observer"]))
    registry.observer("far", "no_such_package:Far", library="no_such_library", extra="far")
    for settings, said in (
        ({"observe": "recoder"}, "unknown observer 'recoder'; did you mean 'recorder'"),
        ({"observe": "far"}, "observer 'far' needs no_such_library, which is not installed"),
        ({"observe": "recorder", "observe_options": {"fil": "x"}}, "unknown option of recorder 'fil'; did you mean"),
        ({"observe": "recorder"}, "option file of recorder: field required"),
        ({"observe_options": {"file": "x"}}, "observer options need the name of what they belong to; add `observe`"),
        ({"observe": ["recorder", "far"], "observe_options": {"file": "x"}}, "unknown observer in options of several"),
        ({"observe": 3}, "observe"),
    ):
        with pytest.raises(PruneForgeError) as error:
            pruneforge.prune("./no/such/model", "magnitude", 0.5, **settings)
        assert said in str(error.value)


def test_the_first_of_several_processes_logs_and_the_command_prints_its_result_alone(tmp_path):
    file = tmp_path / "recorder.py"
    file.write_text(RECORDER)
    asked = ["prune", "demo:text", *commands.SETTINGS, "-p", file, "--output", tmp_path / "out", "--json"]
    asked += ["--observe", "recorder:mine", "--observe-option", f"file={tmp_path / 'log'}"]
    first, second = commands.run_together(2, *asked)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert json.loads(first.stdout)["warnings"] == []
    assert "looks like a result" in first.stderr
    assert "looks like a result" not in second.stderr
    assert [line[2] for line in told(tmp_path / "log")] == ["start", *["log"] * 5, "close"]
