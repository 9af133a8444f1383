"""Runs in the trackers' own local stores, each read without the code that wrote it where that is possible."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from collections.abc import Iterator

import commands
import pytest

import pruneforge

SETTINGS = [word for word in commands.SETTINGS if word not in ("--sparsity", "0.5")]
PRUNE = ("prune", "demo:text", *SETTINGS, "--pattern", "2:4,1:4", "--propagate", "dense")
SHARES = {"out-2of4": 0.5, "out-1of4": 0.75}

NEVER = """
from pruneforge import Metric


class Never(Metric):
    def score(self, layer, stats):
        raise ValueError("not today")
"""


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed (pip install '.[{library}]')")


def prune(observer, folder, **environment):
    """Prune to two patterns at once, and return the reports by the names of the runs."""
    quiet = {"HOME": str(folder), "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | environment
    done = commands.run(*PRUNE, "--output", folder / "out", "--observe", f"{observer}:mine", "--json", **quiet)
    assert done.returncode == 0, done.stderr
    assert [report["warnings"] for report in json.loads(done.stdout)] == [[], []]
    return {f"out-{name}": pruneforge.load(folder / "out" / name).report for name in ("2of4", "1of4")}


@needs("trackio")
def test_trackio_keeps_every_run_with_its_recipe_blocks_and_result(tmp_path):
    reports = prune("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "kept"))
    with sqlite3.connect(tmp_path / "kept" / "mine.db") as database:
        configs = dict(database.execute("SELECT run_name, config FROM configs"))
        rows = list(database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step"))
    assert set(configs) == set(reports) == set(SHARES)
    for name, report in reports.items():
        config = json.loads(configs[name])
        assert (config["metric"], config["pattern"]) == ("wanda", report["recipe"]["pattern"])
        assert {key for key in config if key.startswith("_")} <= {"_Username", "_Created", "_Group"}
        steps = [step for run, step, _ in rows if run == name]
        *blocks, last = [json.loads(metrics) for run, _, metrics in rows if run == name]
        assert steps == list(range(6))
        assert [block["block/sparsity"] for block in blocks] == [SHARES[name]] * 5
        assert last["run/sparsity"] == report["sparsity"]["reached"]
        assert last["run/seconds/total"] == report["measured"]["seconds"]["total"]
    with sqlite3.connect(tmp_path / "kept" / "mine.db") as database:
        assert database.execute("SELECT count(*) FROM system_metrics").fetchone() == (0,)


@needs("trackio")
def test_a_run_of_trackio_that_failed_says_so(tmp_path):
    plugin = tmp_path / "never.py"
    plugin.write_text(NEVER)
    asked = [word if word != "wanda" else "never" for word in PRUNE]
    asked += ["-p", plugin, "--output", tmp_path / "out", "--observe", "trackio:mine"]
    done = commands.run(*asked, HOME=str(tmp_path), TRACKIO_DIR=str(tmp_path / "kept"))
    assert "not today" in done.stderr
    with sqlite3.connect(tmp_path / "kept" / "mine.db") as database:
        found = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics")]
    assert found == [{"run/failed": 1}] * 2


@needs("mlflow")
def test_mlflow_keeps_every_run_with_its_recipe_blocks_and_result(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    store = (tmp_path / "kept").as_uri()
    reports = prune("mlflow", tmp_path, MLFLOW_TRACKING_URI=store)
    from mlflow import MlflowClient

    client = MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {run.info.run_name for run in found} == set(reports)
    for run in found:
        report = reports[run.info.run_name]
        assert (run.info.status, run.data.params["metric"]) == ("FINISHED", "wanda")
        history = client.get_metric_history(run.info.run_id, "block/sparsity")
        assert [(each.step, each.value) for each in history] == [(n, SHARES[run.info.run_name]) for n in range(5)]
        assert run.data.metrics["run/sparsity"] == report["sparsity"]["reached"]
        assert run.data.tags["run/peak_memory/host_covers"] == report["measured"]["peak_memory"]["host_covers"]


@needs("mlflow")
def test_a_run_without_a_summary_has_failed(tmp_path, monkeypatch):
    for name, value in {"ALLOW_FILE_STORE": "true", "TRACKING_URI": (tmp_path / "kept").as_uri()}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    observer = pruneforge.create("observer", "mlflow:mine")
    observer.start("one", {"metric": "x" * 10_000})  # texts that are too long are cut
    observer.close(None)
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FAILED")
    other = pruneforge.create("observer", "mlflow:other")
    with pytest.raises(Exception, match="Invalid value"):
        other.start("two", {"metric": "wanda", "no/../name": "x"})  # a parameter that cannot be sent
    (run,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    assert (run.info.run_name, run.info.status) == ("two", "FAILED")


def records(content: bytes) -> Iterator[bytes]:
    """Return the records of a file of W&B's: a log as LevelDB writes it, in blocks of 32 KiB, after 7 bytes."""
    place, found = 7, b""
    while place + 7 <= len(content):
        left = -place % 32768
        if left < 7:  # no room for a head of 7 bytes: checksum, size, and whether it is whole, first, inner or last
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        found += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield found
            found = b""


@needs("wandb")
def test_wandb_keeps_every_run_with_its_recipe_blocks_and_result_and_nothing_else(tmp_path):
    reports = prune("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    from wandb.proto.wandb_internal_pb2 import Record

    def named(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    kept = [file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    runs = [[Record.FromString(record) for record in records(content)] for content in kept]
    assert len(runs) == 2
    for run in runs:
        kinds = [record.WhichOneof("record_type") for record in run]
        assert set(kinds) <= {
            "header",
            "run",
            "telemetry",
            "history",
            "summary",
            "exit",
        }  # no environment, stats, files
        begun, ended = run[kinds.index("run")].run, run[kinds.index("exit")].exit
        report = reports[begun.display_name]
        config = named(begun.config.update)
        assert (begun.project, begun.host, begun.HasField("git")) == ("mine", "", False)
        assert (config["metric"], config["pattern"]) == ("wanda", report["recipe"]["pattern"])
        blocks = [(r.history.step.num, named(r.history.item)) for r in run if r.WhichOneof("record_type") == "history"]
        share = SHARES[begun.display_name]
        assert [(step, values["block/sparsity"]) for step, values in blocks] == [(step, share) for step in range(5)]
        summary = {}
        for record in run:
            summary |= named(record.summary.update)
        assert summary["run/sparsity"] == report["sparsity"]["reached"]
        assert summary["run/seconds/total"] == report["measured"]["seconds"]["total"]
        assert ended.exit_code == 0
    assert not list(tmp_path.glob("wandb/offline-run-*/files/*"))
