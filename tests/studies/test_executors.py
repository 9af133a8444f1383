"""Where and when the parts of a study run has no say in what they leave: processes, clusters, parts, kills."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import CHECKPOINT
from small_study import finished_in, kept, values

from pruneforge import PruneForgeError
from pruneforge.studies import cells as cells_module
from pruneforge.studies.cells import products
from pruneforge.studies.executors import make_executor
from pruneforge.studies.folder import CELL_FILE, StudyFolder, as_json, place_of
from pruneforge.studies.plan import cells_of
from pruneforge.studies.report import write_report
from pruneforge.studies.run import chosen_cells, run_study
from pruneforge.studies.study import make_study


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
from pruneforge.studies.plan import cells_of
from pruneforge.studies.study import make_study

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
        monkeypatch.setenv("TMPDIR", folder)
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


def test_only_missing_cells_are_made_in_parts_that_are_whole_products(unbroken):
    study = make_study(values(patterns=[0.3, 0.5, 0.7, "2:4"], seeds=[0]))
    every = cells_of(study, [])
    missing = [cell for cell in every if cell.method != "random" or cell.pattern == 0.7]  # one of the last method
    for at_once in (1, 2, 3, 5, 8, 100):
        parts = list(products(missing, at_once))
        assert sorted(cell.key for part in parts for cell in part) == sorted(cell.key for cell in missing)
        for part in parts:
            methods, patterns = {cell.method for cell in part}, {cell.pattern for cell in part}
            assert len(part) == len(methods) * len(patterns) <= at_once
    assert [len(part) for part in products(missing, 100)] == [12, 1]


def test_a_failure_does_not_replace_what_is_finished(unbroken, tmp_path):
    held, cell = StudyFolder(tmp_path), cells_of(make_study(values()), [])[0]
    good = (unbroken / place_of(cell, CELL_FILE)).read_bytes()
    bad = as_json({"asked": cell.asked(), "failed": "no room"})
    for contents, left in (([bad, good], good), ([good, bad], good), ([bad], bad)):
        shutil.rmtree(tmp_path / "cells", ignore_errors=True)
        for content in contents:
            held.keep(place_of(cell, CELL_FILE), content)
        assert (tmp_path / place_of(cell, CELL_FILE)).read_bytes() == left


def test_one_device_is_not_for_several_workers(tmp_path):
    study = make_study(values(device="cuda:1"))
    with pytest.raises(PruneForgeError, match="cuda:1"):
        run_study(study, tmp_path / "out", executor=make_executor("local", workers=2))


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    file, folder = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(values(), sort_keys=False))
    started = subprocess.run(
        [sys.executable, "-c", KILLED_WITH_WORKERS, str(file), str(folder), str(tmp_path / "pids")], capture_output=True
    )
    assert started.returncode == -signal.SIGKILL, started.stderr
    workers = [
        psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split() if psutil.pid_exists(int(pid))
    ]
    _, living = psutil.wait_procs(workers, timeout=60)
    assert not living
    run_study(make_study(values()), folder)
    assert not list(folder.glob(".work-*"))


KILLED_WITH_WORKERS = """
import multiprocessing, os, signal, sys, yaml
from pathlib import Path
from pruneforge.studies.executors import make_executor
from pruneforge.studies.run import run_study
from pruneforge.studies.study import make_study

executor = make_executor("local", workers=2)
run = executor.run

def killing(parts, held):
    for place in run(parts, held):
        if place.endswith("cell.json"):
            Path(sys.argv[3]).write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            os.kill(os.getpid(), signal.SIGKILL)
        yield place

executor.run = killing
run_study(make_study(yaml.safe_load(open(sys.argv[1]))), Path(sys.argv[2]), executor=executor)
"""


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
