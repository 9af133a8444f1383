"""What only a GPU can show: `make test-cuda` runs these there, and `make test` skips them where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, outcome, tokens
from device_cases import CASES, METRICS, assert_same_output, settings_of, small

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.interfaces import selection
from pruneforge.interfaces.hookspecs import hookimpl
from pruneforge.interfaces.patterns import parse_pattern
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.estimate import estimate

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda", 0)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_in_memory_masks_are_those_of_the_cpu_and_the_model_returns(metric, case):
    settings = settings_of(case, metric)
    expected, found = (pruneforge.prune(small(), metric, **settings, device=device) for device in ("cpu", "cuda"))
    assert all(parameter.device.type == "cpu" for parameter in found.model.parameters())
    assert found.report["measured"]["peak_memory"]["device_bytes"] > 0
    assert_same(found.masks, expected.masks)


@pytest.mark.parametrize("metric", METRICS)
def test_streamed_files_are_those_of_the_cpu(metric, tmp_path):
    small().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    for device in ("cpu", "cuda"):
        found = pruneforge.prune(
            tmp_path / "model", metric, 0.5, calibration=tokens().split(3), output=tmp_path / device, device=device
        )
    assert torch.cuda.get_device_name(CUDA) in found.report["identity"]["device"]
    assert_same_output(tmp_path / "cuda", tmp_path / "cpu")


@pytest.mark.parametrize("metric", METRICS)
def test_a_checkpoint_of_another_dtype_than_is_computed_in_streams(metric, tmp_path):
    small(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    for device in ("cpu", "cuda"):
        pruneforge.prune(
            tmp_path / "model", metric, 0.5, calibration=tokens().split(3), output=tmp_path / device, device=device,
            dtype="float64",
        )  # fmt: skip
    masks = [pruneforge.load(tmp_path / device, device="cpu").masks for device in ("cpu", "cuda")]
    assert_same(*masks)


def test_a_model_on_cuda_stays_there_and_is_evaluated_there(checkpoint):
    result = pruneforge.prune(
        checkpoint, "wanda", 0.5, "2:4", "python-docs", samples=4, seqlen=64, device="cuda", dtype="float32"
    )
    assert pruneforge.evaluate(result, "perplexity", data="python-docs", limit=2, device="cuda")["windows"] == 2
    model = small().cuda()
    pruneforge.prune(model, "gblm", 0.5, None, [tokens().cuda()], device="cuda")
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())


@pytest.mark.parametrize("metric", METRICS)
def test_hidden_states_that_wait_in_host_memory_change_nothing(metric, tmp_path, monkeypatch):
    small().save_pretrained(tmp_path / "model")
    batches = tokens(24).split(2)

    def run(name):
        return pruneforge.prune(
            tmp_path / "model", metric, 0.5, calibration=batches, output=tmp_path / name, device="cuda",
            gradient_cache=tmp_path / f"{name}-gradients", profile=True,
        )  # fmt: skip

    expected = run("there")
    monkeypatch.setattr("pruneforge.engine.budget.free_on_device", lambda device: 0)
    found = run("away")
    peaks = found.report["measured"]["activations_peak"]
    assert peaks["device"] == 0
    assert (peaks["host"] > 0) == (metric != "magnitude")
    assert_same(found.masks, expected.masks)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("there", "away")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("metric", METRICS)
def test_two_runs_give_the_same_bytes_and_so_does_one_that_was_interrupted(metric, tmp_path):
    small(num_hidden_layers=3).to(torch.bfloat16).save_pretrained(tmp_path / "model")

    class Stops:
        @hookimpl
        def pruneforge_block_pruned(self, result):
            if result.index == 1:
                raise KeyboardInterrupt

    def run(name, **more):
        return pruneforge.prune(
            tmp_path / "model", metric, 0.5, calibration=tokens().split(2), output=tmp_path / name, device="cuda",
            gradient_cache=tmp_path / f"{name}-gradients", **more,
        )  # fmt: skip

    run("first")
    run("second")
    observer = Stops()
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("third")
    finally:
        loaded_plugins().unregister(observer)
    run("third", resume=True)
    for name in ("second", "third"):
        assert outcome(tmp_path / name) == outcome(tmp_path / "first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["0.5", "0.9", "2:4", "4:8", "1:4"])
@pytest.mark.parametrize("columns", [128, 100, 24])
def test_the_kernel_prunes_as_plain_torch_does(columns, pattern, dtype):
    if ":" in pattern and columns % int(pattern.partition(":")[2]):
        pytest.skip("no whole number of groups")
    from pruneforge_sparsegpt import kernel
    from pruneforge_sparsegpt.metric import column_pruner, inverse_factor, prune_columns

    asked = parse_pattern(None, pattern, "layer") if ":" in pattern else parse_pattern(float(pattern), None, "layer")
    assert column_pruner(CUDA, dtype, columns, asked) == (kernel.prune_columns, ())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    factor = inverse_factor(inputs.T @ inputs + 0.1 * torch.eye(columns, dtype=torch.float64)).to(CUDA, dtype)
    weight = torch.randn(columns, 1000, generator=generator, dtype=torch.float64).to(CUDA, dtype)
    plain, fast = weight.clone(), weight.clone()
    expected, found = prune_columns(plain, factor, asked), kernel.prune_columns(fast, factor, asked)
    agreeing = (expected[1] == found[1]).double().mean().item()
    assert agreeing == 1 if dtype == torch.float64 else agreeing > 0.9999
    same = (expected[1] == found[1]).all(0)  # rows in which rounding moved no mask
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(fast[:, same], plain[:, same], **tolerance)
    torch.testing.assert_close(found[0][:, same], expected[0][:, same], **tolerance)


@pytest.mark.parametrize("shape", [(1, 100_000), (7, 40), (4096, 24)])
@pytest.mark.parametrize("values", [4, 1_000_000])
def test_selection_is_that_of_the_cpu(shape, values):
    scores = torch.randint(values, shape, generator=torch.Generator().manual_seed(0)).float()
    for count in (0, 1, shape[1] // 2, shape[1]):
        for select, number in ((selection.prune_smallest, count), (selection.prune_smallest_of_all, count * shape[0])):
            for laid_out in (scores, scores.T.contiguous().T):
                assert torch.equal(select(laid_out.to(CUDA), number).cpu(), select(laid_out.contiguous(), number))


def test_a_dry_run_says_what_the_device_takes(tmp_path):
    small().save_pretrained(tmp_path / "model")
    found = estimate(tmp_path / "model", "gblm", calibration=tokens().split(3), sparsity=0.5, device="cuda")
    assert found.device_bytes > 0
    assert all(seconds < 60 for seconds in found.seconds.values())  # nothing counts loading and compiling many times


def test_a_full_device_is_one_line(tmp_path):
    model = small()
    torch.cuda.empty_cache()  # what torch holds already is not counted
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(PruneForgeError, match="the device has no room left"):
            pruneforge.prune(model, "wanda", 0.5, calibration=[tokens()], device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_on_the_cpu_does_not_wake_cuda():
    code = (
        "import torch, pruneforge\n"
        f"pruneforge.prune({str(CHECKPOINT)!r}, 'magnitude', 0.5, device='cpu')\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_the_second_device_makes_no_context_on_the_first(tmp_path):
    small().save_pretrained(tmp_path / "model")
    code = (
        "import sys, torch, pruneforge\n"
        "ids = torch.randint(96, (8, 24))\n"
        "pruneforge.prune(sys.argv[1], 'gblm', 0.5, calibration=ids.split(2), output=sys.argv[2], device='cuda:1')\n"
        "assert not torch._C._cuda_hasPrimaryContext(0)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("metric", ["sparsegpt", "gblm"])
def test_two_processes_with_nccl_make_the_masks_of_one(metric, tmp_path):
    small().save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, torch, pruneforge\n"
        "ids = torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(0))\n"
        "device = 'cuda' if torch.cuda.device_count() > 1 else 'cuda:0'\n"
        "pruneforge.prune(sys.argv[1], sys.argv[2], 0.5, calibration=ids.split(2), output=sys.argv[3], device=device)\n"
    )
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(script), str(tmp_path / "model"), metric, str(tmp_path / str(processes))]
        environment = {**os.environ, "PRUNEFORGE_CACHE": str(tmp_path / f"gradients-{processes}")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode and "Duplicate GPU" in done.stderr:
            pytest.skip("this NCCL does not let two processes share a device, and there is one")
        assert done.returncode == 0, done.stderr
    masks = [(tmp_path / name / "pruneforge.masks").read_bytes() for name in ("1", "2")]
    assert masks[0] == masks[1]


def test_blocks_are_read_while_others_compute(tmp_path):
    small(num_hidden_layers=6, hidden_size=512, intermediate_size=2048).save_pretrained(tmp_path / "model")
    pruneforge.prune(
        tmp_path / "model", "wanda", 0.5, calibration=tokens(64).split(4), output=tmp_path / "out", device="cuda",
        profile=True,
    )  # fmt: skip
    events = json.loads((tmp_path / "out" / "profile.json").read_text())["traceEvents"]
    spans = {
        kind: [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == kind] for kind in ("read", "prune")
    }
    work = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("calibrate", "propagate", "prune")]
    overlapping = [read for read in spans["read"] if any(start < read[1] and read[0] < stop for start, stop in work)]
    assert len(overlapping) >= len(spans["read"]) // 2
