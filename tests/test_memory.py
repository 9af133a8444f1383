"""What a run says of memory that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch

import pruneforge
from pruneforge.errors import UnfinishedError
from pruneforge.memory import one_line_for_full_devices
from pruneforge.plugins import loaded_plugins

ASKED = {"sparsity": 0.5, "calibration": "python-docs", "samples": 8, "seqlen": 32}


def test_a_full_device_is_one_line_that_names_the_ways_out():
    long = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB\nof which 1 GiB is free."
    )
    with pytest.raises(UnfinishedError) as error, one_line_for_full_devices():
        raise torch.OutOfMemoryError(long)
    assert str(error.value).startswith("the device has no room left: CUDA out of memory; free some of it and run again")
    assert "\n" not in str(error.value)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="another"), one_line_for_full_devices():
        raise RuntimeError("another")


def test_a_full_host_is_one_line_too():
    said = "the host has no memory left; .* smaller `batch_size`"
    with pytest.raises(UnfinishedError, match=said), one_line_for_full_devices():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(UnfinishedError, match="the host has no memory left"), one_line_for_full_devices():
        bytearray(1 << 60)


HUNGRY = """
import torch
from pruneforge import ColumnSquares, Metric

class Narrow(ColumnSquares):
    def update(self, inputs, samples):
        if samples > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        super().update(inputs, samples)

class Hungry(Metric):
    requires = (Narrow,)

    def score(self, layer, stats):
        return layer.weight.abs() * stats[Narrow].per_sample() ** 0.5
"""


LIMITED = """
import resource
import torch
from pathlib import Path
from pruneforge import ColumnSquares, Metric, hookimpl

class Wide(ColumnSquares):
    def update(self, inputs, samples):
        torch.empty(samples << 27)
        super().update(inputs, samples)

class Hungry(Metric):
    requires = (Wide,)

    def score(self, layer, stats):
        return layer.weight.abs() * stats[Wide].per_sample() ** 0.5

@hookimpl
def pruneforge_run_started(run):
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_600_000_000,) * 2)

@hookimpl
def pruneforge_register(registry):
    registry.metric("hungry", Hungry)
"""


@pytest.fixture
def hungry(tmp_path):
    def load(room):
        file = tmp_path / "hungry.py"
        file.write_text(f"ROOM = {room}\n{HUNGRY}")
        loaded_plugins().load_file(file)

    return load


@pytest.mark.parametrize("streamed", [True, False])
def test_smaller_batches_are_tried_and_recorded_where_nobody_chose_a_size(streamed, hungry, tmp_path):
    hungry(2)
    output = tmp_path / "out" if streamed else None
    result = pruneforge.prune("demo:text", "hungry", output=output, **ASKED)
    assert result.report["recipe"]["batch_size"] == 2
    assert result.report["calibration"]["batch_size"] == 2
    (warning,) = [text for text in result.report["warnings"] if "memory" in text]
    assert "batches of 8 samples did not fit in memory, so 2 went through" in warning
    assert "pass `batch_size` 2" in warning
    asked = pruneforge.prune("demo:text", "hungry", batch_size=2, **ASKED)
    assert all(torch.equal(asked.masks[name], mask) for name, mask in result.masks.items())
    assert asked.report["warnings"] == []


def test_a_size_that_was_chosen_is_not_changed_and_one_that_never_fits_is_an_error(hungry, tmp_path):
    hungry(0)
    for chosen in ({"batch_size": 4}, {}):
        with pytest.raises(UnfinishedError, match=r"the device has no room left: .* smaller `batch_size`"):
            pruneforge.prune("demo:text", "hungry", output=tmp_path / "out", **ASKED, **chosen)
        assert not (tmp_path / "out").exists()


class Forgetful(torch.nn.Module):
    """Raises for batches of more samples than there is room for."""

    def __init__(self, inner, room):
        super().__init__()
        self.inner, self.room, self.seen = inner, room, []

    def forward(self, hidden, *args, **kwargs):
        self.seen.append(len(hidden))
        if len(hidden) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(hidden, *args, **kwargs)


@pytest.mark.parametrize(("room", "size"), [(3, 2), (1, 1)])
def test_an_evaluation_tries_smaller_batches_where_nobody_chose_a_size(room, size, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The parrot is no more. " * 200)
    asked = {"data": str(text), "window": 64}
    dense = pruneforge.prune("demo:text", "magnitude", 0.0)
    expected = pruneforge.evaluate(dense, "perplexity", **asked, batch_size=size)
    layers = dense.model.model.layers
    layers[0] = narrow = Forgetful(layers[0], room)
    found = pruneforge.evaluate(dense, "perplexity", **asked)
    assert found["perplexity"] == expected["perplexity"]
    (warning,) = [said for said in found["warnings"] if "memory" in said]
    assert f"so {size} went through the model together" in warning
    assert max(narrow.seen) > room
    with pytest.raises(UnfinishedError, match="the device has no room left"):
        pruneforge.evaluate(dense, "perplexity", **asked, batch_size=room + 1)
    narrow.room = 0
    with pytest.raises(UnfinishedError, match="the device has no room left"):
        pruneforge.evaluate(dense, "perplexity", **asked)


def test_a_limit_of_the_system_is_met_with_smaller_batches(tmp_path):
    """A run whose statistics take 512 MB a sample, in a process that may grow by 1.6 GB."""
    (tmp_path / "hungry.py").write_text(LIMITED)
    done = commands.run(
        "prune", "demo:text", "--metric", "hungry", "-p", tmp_path / "hungry.py", "--sparsity", "0.5",
        *("--calibration", "python-docs", "--samples", "8", "--seqlen", "32", "--output", tmp_path / "out", "--json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"]["batch_size"] in (1, 2)
    assert "batches of 8 samples did not fit in memory" in report["warnings"][0]


def test_a_model_in_memory_is_not_pruned_twice(hungry):
    hungry(2)
    model = pruneforge.prune("demo:text", "magnitude", 0.0).model
    with pytest.raises(UnfinishedError, match="the device has no room left"):
        pruneforge.prune(model, "hungry", 0.5, None, [torch.ones(8, 32, dtype=torch.int64)])


@pytest.mark.parametrize("full", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")])
def test_a_plugin_that_meets_a_full_host_leaves_a_run_that_goes_on(full, tmp_path):
    class Hungry(pruneforge.Metric):
        room = False

        def score(self, layer, stats):
            if ".3." in layer.name and not self.room:
                raise full
            return layer.weight.abs()

    loaded_plugins().registry.metric("hungry", Hungry)
    try:
        said = (
            r"the host has no memory left, in metric 'hungry' on layer 'model\.layers\.3\.[a-z_.]+'; .* \(with `resume`"
        )
        with pytest.raises(UnfinishedError, match=said):
            pruneforge.prune("demo:text", "hungry", 0.5, output=tmp_path / "out")
        assert (tmp_path / "out" / "journal.jsonl").is_file()
        Hungry.room = True
        pruneforge.prune("demo:text", "hungry", 0.5, output=tmp_path / "out", resume=True)
    finally:
        loaded_plugins.cache_clear()
    whole = pruneforge.prune("demo:text", "magnitude", 0.5, options={"scope": "row"}, output=tmp_path / "whole")
    masks = pruneforge.load(tmp_path / "out").masks
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in masks.items())


def own_group() -> tuple[Path, str] | None:
    """The folder of this process's control group of memory, and the file of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for mount, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
            folder = Path(mount + path)
            if (controllers == "memory") == (limit == "memory.limit_in_bytes") and (folder / limit).exists():
                return folder, limit
    return None


def test_a_limit_of_a_control_group_counts_and_what_files_take_of_it_does_not(tmp_path):
    """In a group of 700 MB, of which a file that was read takes 300 MB until memory is needed."""
    found = own_group() if Path("/proc/self/cgroup").exists() else None
    if found is None:
        pytest.skip("no control group limits memory here")
    group = found[0] / f"pruneforge-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / found[1]).write_text(str(700 << 20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group can be made: {error}")
    code = (
        "import os, sys; from pathlib import Path\n"
        f"try: Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        "except OSError: sys.exit(3)\n"
        "from pruneforge.memory import free_bytes\n"
        "before = free_bytes()\n"
        "with open('large', 'wb') as file:\n"
        "    for _ in range(300): file.write(bytes(1 << 20))\n"
        "    file.flush(); os.fsync(file.fileno())\n"
        "print(before, free_bytes())\n"
    )
    try:
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        group.rmdir()
    if run.returncode == 3:
        pytest.skip("no process can be moved to a control group")
    assert run.returncode == 0, run.stderr
    before, after = map(int, run.stdout.split())
    assert 300 << 20 < before <= 700 << 20
    assert after > before - (100 << 20)
