"""Runs in the trackers' own local stores, each read without the code that wrote it where that is possible."""

from __future__ import annotations

import importlib.util
import json
import sqlite3

import commands
import pytest

import pruneforge

PRUNE = ("prune", "demo:text", *commands.SETTINGS, "--pattern", "2:4,1:4", "--propagate", "dense")
SHARES = {"out-2of4": 0.5, "out-1of4": 0.75}


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed (pip install '.[{library}]')")


def prune(observer, folder, **environment):
    """Prune to two patterns at once, and return the reports by the names of the runs."""
    asked = [word for word in PRUNE if word not in ("--sparsity", "0.5")]
    quiet = {"HOME": str(folder), "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | environment
    done = commands.run(*asked, "--output", folder / "out", "--observe", f"{observer}:mine", "--json", **quiet)
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
        steps = [step for run, step, _ in rows if run == name]
        *blocks, last = [json.loads(metrics) for run, _, metrics in rows if run == name]
        assert steps == list(range(6))
        assert [block["block/sparsity"] for block in blocks] == [SHARES[name]] * 5
        assert last["run/sparsity"] == report["sparsity"]["reached"]
        assert last["run/seconds/total"] == report["measured"]["seconds"]["total"]


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


@needs("wandb")
def test_wandb_keeps_every_run_with_its_recipe_blocks_and_result(tmp_path):
    reports = prune("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    kept = [file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(kept) == 2
    for name in reports:
        (content,) = [each for each in kept if name.encode() in each]  # texts stand in these files as they are
        assert content.count(b"block/sparsity") >= 5
        for text in (b"mine", b"propagate", b"run/sparsity", b"run/seconds/total", str(SHARES[name]).encode()):
            assert text in content, text
