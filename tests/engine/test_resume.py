"""Runs that are killed, refused or share a folder; runs of several processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
from conftest import CHECKPOINT, outcome, tiny_llama, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.checkpoint.journal import Journal, entry_of, line_of
from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.interfaces.hookspecs import hookimpl
from pruneforge.plugins import loaded_plugins

KILLER = Path(__file__).parent / "killer.py"
SETTINGS = ["--sparsity", "0.5", "--calibration", "python-docs", "--samples", "4", "--seqlen", "64", "-p", str(KILLER)]


def arguments(output, metric, *more, model=CHECKPOINT):
    return ["prune", model, "--metric", metric, *SETTINGS, "--output", output, *more]


def prune(output, metric, *more, kill_at=0, model=CHECKPOINT, **environment):
    return commands.run(*arguments(output, metric, *more, model=model), KILL_AT=str(kill_at), **environment)


def prune_together(processes, output, metric, *more, kill_at=0, model=CHECKPOINT, **environment):
    asked = arguments(output, metric, *more, model=model)
    return commands.run_together(processes, *asked, KILL_AT=str(kill_at), **environment)


def succeeded(ranks):
    assert [done.returncode for done in ranks] == [0] * len(ranks), [done.stderr for done in ranks]
    return True


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    found = {}
    for metric in ("sparsegpt", "gblm"):
        done = prune(folder / metric, metric, "--gradient-cache", str(folder / "cache"))
        assert done.returncode == 0, done.stderr
        found[metric] = outcome(folder / metric)
    return found


# Which call writes what: laying out the files, a block, the journal, a gradient file, the final names.
@pytest.mark.parametrize(
    ("metric", "instants"), [("sparsegpt", [2, 9]), ("sparsegpt", [14, 20, 27]), ("gblm", [11, 40]), ("gblm", [94, 99])]
)
def test_a_killed_run_resumes_to_the_same_bytes(metric, instants, unbroken, tmp_path):
    output = tmp_path / "out"
    for instant in instants:
        killed = prune(output, metric, "--resume", kill_at=instant)
        assert killed.returncode == -signal.SIGKILL, (instant, killed.stderr)
        assert not (output / "pruneforge.json").exists() or (output / "journal.jsonl").exists()
    done = prune(output, metric, "--resume")
    assert done.returncode == 0, done.stderr
    assert outcome(output) == unbroken[metric]
    again = prune(output, metric, "--resume")
    assert again.returncode == 0, again.stderr
    assert outcome(output) == unbroken[metric]


@pytest.mark.parametrize("instants", [[4, 30, 51], [70]])
def test_a_killed_run_of_several_patterns_resumes_each_of_them(instants, tmp_path):
    several = ["--sparsity", "0.3,0.5", "--pattern", "2:4", "--propagate", "dense"]
    output = tmp_path / "all"
    killed = 0
    for instant in instants:
        killed += prune(output, "sparsegpt", *several, "--resume", kill_at=instant).returncode == -signal.SIGKILL
    assert killed
    done = prune(output, "sparsegpt", *several, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("0.3", "0.5"):
        alone = prune(tmp_path / name, "sparsegpt", "--sparsity", name, "--propagate", "dense")
        assert alone.returncode == 0, alone.stderr
        assert outcome(output / name) == outcome(tmp_path / name)
    assert sorted(path.name for path in output.iterdir()) == ["0.3", "0.5", "2of4"]


def saved(folder: Path, seed: int = 0) -> Path:
    tiny_llama(torch.float32, seed).save_pretrained(folder, max_shard_size="100KB")
    return folder


def stop_after(block, monkeypatch):
    """Make the journal fail, as a full disk would, once so many blocks are in it."""
    append = Journal.append

    def failing(self, entry):
        if entry.get("block") == block:
            raise KeyboardInterrupt
        append(self, entry)

    monkeypatch.setattr(Journal, "append", failing)


def test_an_interrupted_run_goes_on_only_as_the_same_run(tmp_path, monkeypatch):
    model, batches, output = saved(tmp_path / "model"), tokens().split(2), tmp_path / "out"
    expected = pruneforge.prune(model, "wanda", 0.5, None, batches, output=tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune(model, "wanda", 0.5, None, batches, output=output)
    left = {path.name: path.read_bytes() for path in output.iterdir()}

    def refused(said, metric="wanda", sparsity=0.5, data=batches, folder=model, resume=True, **more):
        with pytest.raises(PruneForgeError) as error:
            pruneforge.prune(folder, metric, sparsity, None, data, output=output, resume=resume, **more)
        assert said in str(error.value)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == left

    refused("holds an unfinished run; go on with `resume`", resume=False)
    refused("another one: recipe sparsity was 0.5 and is 0.6 now", sparsity=0.6)
    refused('another one: recipe metric was "wanda" and is "magnitude" now', metric="magnitude")
    refused("another one: recipe seed was 0 and is 1 now", seed=1)
    refused("calibration data fingerprint was", data=tokens(seed=9).split(2))
    journal = output / "journal.jsonl"
    lines = journal.read_text()
    file = model / "model-00003-of-00010.safetensors"
    file = next(iter(sorted(model.glob("model-0000[3-9]*")))) if not file.exists() else file
    tensors = {name: value.clone() for name, value in load_file(file).items()}  # the file itself is written over
    save_file({name: value + 1e-3 for name, value in tensors.items()}, file, {"format": "pt"})
    refused("model fingerprint was")
    save_file(tensors, file, {"format": "pt"})
    first, _, others = lines.partition("\n")
    identity = entry_of(first.encode())
    assert set(identity["version of"]) >= {"torch"}
    for changed, said in [
        ({**identity, "format": 0}, "format was 0 and is 2 now"),
        ({**identity, "version of": {**identity["version of"], "torch": "1.0"}}, 'version of torch was "1.0"'),
    ]:
        journal.write_text(line_of(changed).decode() + others)
        left = {path.name: path.read_bytes() for path in output.iterdir()}
        refused(said)
    for edited in [lines[:40] + "\n" + lines, "{}\n" + lines, lines.replace("sparsity", "Sparsity"), "1\n", "\xff\n"]:
        journal.write_text(edited)
        left = {path.name: path.read_bytes() for path in output.iterdir()}
        refused("line 1 of")
    journal.write_text(lines.replace("layers.0", "layers.1"))  # in the line of the first block
    left = {path.name: path.read_bytes() for path in output.iterdir()}
    refused("damaged, was edited, or is of another version")
    journal.write_text(lines + '{"block": 2, "pru')  # being written when the power went
    result = pruneforge.prune(model, "wanda", 0.5, None, batches, output=output, resume=True)
    assert outcome(output) == outcome(tmp_path / "whole")
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    model, output = saved(tmp_path / "model"), tmp_path / "out"
    held = Journal(output, {"some": "run"}, resume=False)
    with pytest.raises(PruneForgeError, match="another process is writing to output folder"):
        pruneforge.prune(model, "magnitude", 0.5, output=output, resume=True)
    held.close()


def test_a_full_disk_leaves_a_run_that_can_go_on(tmp_path):
    model, output = saved(tmp_path / "model"), tmp_path / "out"
    whole = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills:
        """Lets no file grow beyond a size from one block on."""

        def __init__(self, block):
            self.block = block

        @hookimpl
        def pruneforge_block_pruned(self, result):
            if result.index == self.block:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    for block, left in ((None, False), (1, True)):  # by then the first block is on the disk
        observer = Fills(block)
        loaded_plugins().register(observer)
        if block is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(PruneForgeError, match="cannot be written: File too large"):
                pruneforge.prune(model, "magnitude", 0.5, output=output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            loaded_plugins().unregister(observer)
        assert (output / "journal.jsonl").exists() == left
    result = pruneforge.prune(model, "magnitude", 0.5, output=output, resume=True)
    assert outcome(output) == outcome(tmp_path / "whole")
    assert all(torch.equal(result.masks[name], mask) for name, mask in whole.masks.items())


def test_a_read_error_leaves_a_run_that_can_go_on(tmp_path):
    model, output = saved(tmp_path / "model"), tmp_path / "out"
    whole = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "whole")
    last = model / Checkpoint(model).tensors["model.layers.2.mlp.down_proj.weight"].file

    class Unplugs:
        @hookimpl
        def pruneforge_block_pruned(self, result):
            if result.index == 0:
                last.rename(tmp_path / "away")

    observer = Unplugs()
    loaded_plugins().register(observer)
    try:
        with pytest.raises(PruneForgeError, match="cannot be read: No such file or directory; once it can, go on with"):
            pruneforge.prune(model, "magnitude", 0.5, output=output)
    finally:
        loaded_plugins().unregister(observer)
    (tmp_path / "away").rename(last)
    result = pruneforge.prune(model, "magnitude", 0.5, output=output, resume=True)
    assert outcome(output) == outcome(tmp_path / "whole")
    assert all(torch.equal(result.masks[name], mask) for name, mask in whole.masks.items())


def test_what_cannot_be_done_leaves_no_trace(tmp_path):
    model = saved(tmp_path / "model")
    file = next(iter(sorted(model.glob("model-0000[3-9]*"))))
    tensors = load_file(file)
    damaged = {name: value * torch.nan if "proj" in name else value for name, value in tensors.items()}
    save_file(damaged, file, {"format": "pt"})
    with pytest.raises(PruneForgeError, match="non-finite weights"):
        pruneforge.prune(model, "gblm", 0.5, None, [tokens()], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("processes", "dtype", "agreement"),
    [
        (2, "float64", 1),
        pytest.param(4, "float64", 1, marks=pytest.mark.slow),
        pytest.param(2, "float32", 0.9999, marks=pytest.mark.slow),
    ],
)
def test_processes_share_a_run_and_make_its_masks(processes, dtype, agreement, tmp_path):
    model = tmp_path / "model"  # rounding updated weights to a coarser dtype would make much of little
    AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype).save_pretrained(model)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(model)
    for metric in ("gblm", "sparsegpt") if processes == 2 else ("gblm",):
        # More tokens than the widest layer has inputs: a Hessian without full rank makes much of little, too.
        alone = prune(tmp_path / metric, metric, "--samples", "16", model=model)
        assert alone.returncode == 0, alone.stderr
        output = tmp_path / f"{metric}-shared"
        cache = str(tmp_path / "cache-shared")
        more = ("--samples", "16", "--gradient-cache", cache)
        shared = prune_together(processes, output, metric, *more, model=model)
        assert succeeded(shared)
        assert sum(done.stdout.count("pruned ") for done in shared) == 1
        masks = [pruneforge.load(folder).masks for folder in (tmp_path / metric, output)]
        same = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0])
        assert same / sum(mask.numel() for mask in masks[0].values()) >= agreement


@pytest.mark.slow
def test_torchrun_gives_what_processes_with_its_variables_give(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pruneforge", *map(str, arguments(tmp_path / "torchrun", "wanda"))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert succeeded(prune_together(2, tmp_path / "out", "wanda"))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "torchrun")


def test_a_process_that_dies_ends_the_run_which_can_go_on(tmp_path):
    whole = tmp_path / "whole"
    assert succeeded(prune_together(2, whole, "wanda"))
    output = tmp_path / "out"
    for rank, at in ((0, 14), (1, -2)):  # the second process writes nothing, and dies in a block instead
        ranks = prune_together(2, output, "wanda", "--resume", kill_at=at, KILL_RANK=str(rank))
        assert ranks[rank].returncode == -signal.SIGKILL
        assert ranks[1 - rank].returncode == 2
        assert "another process of the run ended or cannot be reached" in ranks[1 - rank].stderr
        assert (output / "journal.jsonl").exists()
    assert succeeded(prune_together(2, output, "wanda", "--resume"))
    assert outcome(output) == outcome(whole)
    refused = prune_together(2, output, "wanda", "--resume", "--batch-size", "64")
    assert [done.returncode for done in refused] != [0, 0]
    assert "is another one: recipe batch_size was null and is 64 now" in refused[0].stderr


@pytest.mark.parametrize("metric", ["wanda", "gblm"])
@pytest.mark.parametrize(("scope", "propagate"), [(None, "dense"), ("block", "pruned"), ("model", "dense")])
def test_every_way_through_the_blocks_resumes(metric, scope, propagate, tmp_path, monkeypatch):
    model, batches = saved(tmp_path / "model"), tokens().split(2)
    settings = {"options": {"scope": scope} if scope else {}, "propagate": propagate}
    pruneforge.prune(model, metric, 0.5, None, batches, output=tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune(model, metric, 0.5, None, batches, output=tmp_path / "out", **settings)
    pruneforge.prune(model, metric, 0.5, None, batches, output=tmp_path / "out", resume=True, **settings)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_budget_that_is_too_small_costs_no_finished_block(tmp_path, monkeypatch):
    model, output = saved(tmp_path / "model"), tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=output)
    left = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(PruneForgeError, match="memory budget of 1,000 bytes is too small"):
        pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=output, resume=True, memory_budget=1000)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == left


def test_a_finished_run_is_left_alone_and_another_is_refused(tmp_path):
    model, output = saved(tmp_path / "model"), tmp_path / "out"
    first = pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=output, resume=True)
    left = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    again = pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=output, resume=True)
    assert again.report == first.report
    with pytest.raises(PruneForgeError, match=r"finished run in .* is another one: calibration data fingerprint was"):
        pruneforge.prune(model, "wanda", 0.5, None, [tokens(seed=3)], output=output, resume=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(PruneForgeError, match=r"finished run in .* is another one: model fingerprint was"):
        pruneforge.prune(model, "wanda", 0.5, None, [tokens()], output=output, resume=True)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == left
    with pytest.raises(PruneForgeError, match="resume needs a model that is streamed from its folder, and "):
        pruneforge.prune(tiny_llama(), "magnitude", 0.5, output=tmp_path / "b", resume=True)
