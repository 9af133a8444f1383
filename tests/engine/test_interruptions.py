"""Runs that are stopped twice, whose disk fills, or whose output or input is taken away, go on or say what is wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import commands
import pytest
import torch
from conftest import CHECKPOINT, outcome, tiny_llama, tokens

import pruneforge
from pruneforge import Checkpoint, PruneForgeError, Recovery, hookimpl
from pruneforge.checkpoint.journal import Journal
from pruneforge.errors import UnfinishedError
from pruneforge.plugins import loaded_plugins

PLUGIN = """
import os, shutil, signal, subprocess
from pathlib import Path
from pruneforge import hookimpl

@hookimpl
def pruneforge_block_pruned(run, result):
    if result.index == 2 and Path({armed!r}).exists():
        {what}
"""
"""A plugin that does something to its run in the third of five blocks, while a file is there."""

TERMINATED = "os.kill(os.getpid(), signal.SIGTERM)"
TWICE = """try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                pass
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)  # at once: the same request, by another way
            subprocess.run(["bash", "-c", f"sleep 1.2; kill -INT {os.getpid()}; sleep 9"])
            raise"""
FILLS_THE_DISK = """with open(run.folder.parent / "filler", "wb") as file:
            while file.write(bytes(1 << 12)):
                file.flush()"""
LOSES_ITS_FOLDER = "shutil.rmtree(run.folder)"
LOSES_A_FILE = "next(run.folder.glob('*.safetensors*')).unlink()"


class Run:
    """A run of `pruneforge prune` that something happens to in its third block, the first time."""

    def __init__(self, folder: Path, what: str, output: Path) -> None:
        self.armed, self.output, self.plugin = folder / "armed", output, folder / "happens.py"
        self.plugin.write_text(PLUGIN.format(armed=str(self.armed), what=what))
        self.armed.touch()

    def begin(self, *more: object) -> subprocess.CompletedProcess[str]:
        asked = ("prune", CHECKPOINT, *commands.SETTINGS, "-p", self.plugin, "--output", self.output, *more)
        return commands.run(*asked)

    def go_on(self) -> subprocess.CompletedProcess[str]:
        self.armed.unlink(missing_ok=True)
        return self.begin("--resume")


def expected(run: Run, folder: Path) -> dict[str, object]:
    """Return the outcome of the same run when nothing happens."""
    run.armed.unlink(missing_ok=True)
    done = commands.run("prune", CHECKPOINT, *commands.SETTINGS, "-p", run.plugin, "--output", folder)
    assert done.returncode == 0, done.stderr
    return outcome(folder)


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (TERMINATED, 128 + signal.SIGTERM, "interrupted; {output} holds what is finished, go on with --resume"),
        (TWICE, 128 + signal.SIGINT, ""),
    ],
    ids=["SIGTERM", "Ctrl-C twice"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(what, code, said, tmp_path):
    run = Run(tmp_path, what, tmp_path / "out")
    stopped = run.begin()
    assert stopped.returncode == code, stopped.stderr
    assert said.format(output=run.output) in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (run.output / "journal.jsonl").exists()
    done = run.go_on()
    assert done.returncode == 0, done.stderr
    assert outcome(run.output) == expected(run, tmp_path / "whole")


def test_one_of_two_processes_that_is_stopped_ends_the_run_which_goes_on(tmp_path):
    run = Run(tmp_path, f'if os.environ["RANK"] == "1": {TERMINATED}', tmp_path / "out")
    asked = ("prune", CHECKPOINT, *commands.SETTINGS, "-p", run.plugin)
    whole, stopped = tmp_path / "whole", commands.run_together(2, *asked, "--output", run.output)
    assert [done.returncode for done in stopped] == [2, 128 + signal.SIGTERM], [done.stderr for done in stopped]
    assert "another process of the run ended" in stopped[0].stderr
    run.armed.unlink()
    for output in (run.output, whole):
        ranks = commands.run_together(2, *asked, "--output", output, *(["--resume"] if output is run.output else []))
        assert [done.returncode for done in ranks] == [0, 0], [done.stderr for done in ranks]
    assert outcome(run.output) == outcome(whole)


def test_a_disk_that_fills_leaves_a_run_that_can_go_on(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = Run(tmp_path, FILLS_THE_DISK, disk / "out")
        stopped = run.begin()
        assert stopped.returncode == 2, stopped.stderr
        assert "No space left on device" in stopped.stderr
        assert stopped.stderr.count("\n") == 1
        (disk / "filler").unlink()
        done = run.go_on()
        assert done.returncode == 0, done.stderr
        assert outcome(run.output) == expected(run, tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.parametrize("what", [LOSES_ITS_FOLDER, LOSES_A_FILE], ids=["folder", "file"])
def test_an_output_that_is_taken_away_is_one_line_and_no_success(what, tmp_path):
    run = Run(tmp_path, what, tmp_path / "out")
    stopped = run.begin()
    assert stopped.returncode == 2, stopped.stdout
    assert str(run.output) in stopped.stderr
    assert stopped.stderr.count("\n") == 1
    assert not (run.output / "pruneforge.json").exists()
    shutil.rmtree(run.output, ignore_errors=True)
    done = run.go_on()
    assert done.returncode == 0, done.stderr
    assert outcome(run.output) == expected(run, tmp_path / "whole")


@pytest.mark.parametrize("stops", [False, True], ids=["at once", "resumed"])
def test_a_shard_that_is_taken_away_is_no_success(stops, tmp_path):
    """Of several files the one that holds the embeddings is laid out first, and never written again."""
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    held = Checkpoint(tmp_path / "model").tensors["model.embed_tokens.weight"].file
    asked = {"metric": "magnitude", "sparsity": 0.5, "output": tmp_path / "out"}

    class Takes:
        @hookimpl
        def pruneforge_block_pruned(self, result):
            if result.index == 1:
                (tmp_path / "out" / f"{held}.partial").unlink()
                if stops:
                    raise KeyboardInterrupt

    observer, said = Takes(), f"'{held}.partial' was removed from .*; empty the folder and start again"
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt if stops else PruneForgeError, match=None if stops else said):
            pruneforge.prune(tmp_path / "model", **asked)
    finally:
        loaded_plugins().unregister(observer)
    if stops:
        with pytest.raises(PruneForgeError, match=said):
            pruneforge.prune(tmp_path / "model", **asked, resume=True)
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", range(6))
def test_a_flush_that_fails_is_one_line_and_the_run_goes_on(call, tmp_path, monkeypatch):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    asked = {"metric": "magnitude", "sparsity": 0.5, "output": tmp_path / "out"}
    pruneforge.prune(tmp_path / "model", **{**asked, "output": tmp_path / "whole"})
    calls, flush = [], os.fsync

    def fails(descriptor):
        calls.append(descriptor)
        if len(calls) == 3 + 4 * call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(UnfinishedError, match=r"cannot be written: Input/output error; .* `resume`") as error:
            pruneforge.prune(tmp_path / "model", **asked)
    assert "\n" not in str(error.value)
    pruneforge.prune(tmp_path / "model", **asked, resume=(tmp_path / "out").exists())
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_run_that_was_stopped_while_it_gave_up_a_recovery_goes_on(tmp_path, monkeypatch):
    """Between the moment that the pruned model gets the place of the recovered one and the note of it."""

    class Hopeless(Recovery):
        def recover_model(self, site):
            raise ValueError("no way")

    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    asked = {"calibration": [tokens(4)], "recover": Hopeless()}

    def prune(output, **more):
        return pruneforge.prune(tmp_path / "model", "magnitude", 0.5, **asked, output=output, **more)

    with pytest.raises(PruneForgeError, match="no way"):
        prune(tmp_path / "whole")
    append = Journal.append

    def stops(journal, entry):
        if "recovered" in entry:
            raise KeyboardInterrupt
        append(journal, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "out")
    assert (tmp_path / "out" / ".recovered").is_dir()
    assert not (tmp_path / "out" / ".pruned").exists()
    with pytest.raises(PruneForgeError, match="no way"):
        prune(tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
