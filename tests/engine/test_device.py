"""The whole of a run on a device that refuses to meet host tensors, and how often it makes the host wait."""

from __future__ import annotations

import pytest
import simulated_device
import torch
from conftest import tokens
from device_cases import CASES, METRICS, assert_same_output, padded, settings_of, small
from simulated_device import DEVICE, OnDevice, SimulatedDevice, waits

import pruneforge
from pruneforge import Batch, Metric, PruneForgeError
from pruneforge.interfaces import selection
from pruneforge.runs.estimate import estimate

pytestmark = pytest.mark.skipif(simulated_device.MISSING is not None, reason=str(simulated_device.MISSING))


@pytest.fixture
def device(monkeypatch):
    """The device, as `--device` would name it if it were real."""
    for module in ("job", "evaluate", "prune"):
        monkeypatch.setattr(f"pruneforge.runs.{module}.parse_device", lambda name: DEVICE)
    monkeypatch.setattr("pruneforge.engine.budget.free_on_device", lambda device: 1 << 30)
    for module in ("engine.residency", "runs.streaming"):
        monkeypatch.setattr(f"pruneforge.{module}.thread_initializer", lambda device: SimulatedDevice().__enter__)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which tensors of a backend in Python do not survive
    waits.clear()
    with SimulatedDevice():
        yield DEVICE


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, mask in expected.items():
        assert not isinstance(found[name], OnDevice)
        assert torch.equal(found[name], mask), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_in_memory_masks_are_those_of_the_cpu_and_the_model_returns(metric, case, request):
    settings = settings_of(case, metric)
    expected = pruneforge.prune(small(), metric, **settings)
    request.getfixturevalue("device")
    found = pruneforge.prune(small(), metric, **settings)
    assert waits  # it was on the device
    assert all(parameter.device.type == "cpu" for parameter in found.model.parameters())
    assert_same(found.masks, expected.masks)


def test_a_whole_model_recovers_there(request):
    options = {"steps": 3, "rank": 4, "train": ["norms", "head", "masklora"]}
    asked = ("magnitude", 0.5, None, tokens().split(3))
    expected = pruneforge.prune(small(), *asked, recover="perp", recover_options=options)
    request.getfixturevalue("device")
    found = pruneforge.prune(small(), *asked, recover="perp", recover_options=options)
    assert waits
    assert found.report["recovery"] == expected.report["recovery"]
    pairs = zip(found.model.parameters(), expected.model.parameters(), strict=True)
    assert all(not isinstance(one.data, OnDevice) and one.shape == two.shape for one, two in pairs)
    for layer, mask in found.masks.items():
        assert not found.model.get_submodule(layer).weight.masked_fill(mask, 0).any()


@pytest.mark.parametrize("metric", METRICS)
def test_streamed_files_are_those_of_the_cpu(metric, tmp_path, request):
    small().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    data = tokens().split(3)
    pruneforge.prune(tmp_path / "model", metric, 0.5, calibration=data, output=tmp_path / "cpu")
    request.getfixturevalue("device")
    cache = tmp_path / "gradients"
    found = pruneforge.prune(
        tmp_path / "model", metric, 0.5, calibration=data, output=tmp_path / "gpu", gradient_cache=cache
    )
    assert waits
    assert found.report["identity"]["device"] == "gpu"
    assert_same_output(tmp_path / "gpu", tmp_path / "cpu")


def test_several_patterns_are_made_there(tmp_path, request):
    small().save_pretrained(tmp_path / "model")
    data = tokens().split(3)
    pruneforge.prune_each(tmp_path / "model", "sparsegpt", [0.3, "2:4"], data, output=tmp_path / "cpu")
    request.getfixturevalue("device")
    pruneforge.prune_each(tmp_path / "model", "sparsegpt", [0.3, "2:4"], data, output=tmp_path / "gpu")
    for name in ("0.3", "2of4"):
        assert_same_output(tmp_path / "gpu" / name, tmp_path / "cpu" / name)


@pytest.mark.parametrize("shape", [(1, 300), (7, 40), (40, 24)])  # few rows and many are selected from in other ways
@pytest.mark.parametrize("values", [4, 10_000])  # of which many tie, or few
def test_selection_is_that_of_the_cpu_and_the_host_does_not_wait(shape, values, device):
    scores = torch.randint(values, shape, generator=torch.Generator().manual_seed(0)).float()
    for count in (0, 1, shape[1] // 2, shape[1]):
        for select, number in ((selection.prune_smallest, count), (selection.prune_smallest_of_all, count * shape[0])):
            for laid_out in (scores, scores.T.contiguous().T):
                there = laid_out.to(DEVICE)
                waits.clear()
                mask = select(there, number)
                assert not waits
                assert torch.equal(mask.to("cpu"), select(laid_out.contiguous(), number))


@pytest.mark.parametrize(("room", "place"), [(1 << 30, "device"), (0, "host")])
def test_hidden_states_wait_on_the_device_while_they_fit(room, place, device, monkeypatch):
    monkeypatch.setattr("pruneforge.engine.budget.free_on_device", lambda device: room)
    found = pruneforge.prune(small(), "gblm", 0.5, calibration=tokens().split(2))
    peaks = found.report["measured"]["activations_peak"]
    assert [name for name, peak in peaks.items() if peak] == [place]
    assert_same(found.masks, pruneforge.prune(small(), "gblm", 0.5, calibration=tokens().split(3)).masks)


def test_an_error_on_the_way_leaves_the_model_on_the_host(device):
    model = small()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(PruneForgeError, match=r"layers\.1\.mlp\.up_proj' has non-finite weights"):
        pruneforge.prune(model, "gblm", 0.5, calibration=tokens().split(3))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_dry_run_is_made_there_and_says_what_a_run_takes(tmp_path, device):
    small().save_pretrained(tmp_path / "model")
    found = estimate(tmp_path / "model", "gblm", calibration=tokens().split(3), sparsity=0.5)
    assert waits
    assert set(found.seconds) == {"capture", "calibrate", "propagate", "gradients", "prune", "read"}


def test_perplexity_and_top_1_are_those_of_the_cpu(checkpoint, request):
    def evaluated():
        text = pruneforge.evaluate(checkpoint, "perplexity", data="python-docs", window=64, limit=2, dtype="float32")
        images = pruneforge.evaluate("demo:image", "imagenet", data="digits", limit=32)
        return text["perplexity"], images["top1"]

    expected = evaluated()
    request.getfixturevalue("device")
    found = evaluated()
    assert waits
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == expected[1]


def count_waits(metric, samples=6, **changes):
    waits.clear()
    pruneforge.prune(small(**changes), metric, 0.5, calibration=tokens(samples).split(3))
    return sum(waits.values())


# Most times that the host may wait for a layer, and for a block besides: to look for NaN, to check and count its mask
# and bring it to the host, to bring the weight and the gradients back there.
WAITS = {"magnitude": (4, 5), "wanda": (5, 5), "sparsegpt": (5, 5), "gblm": (10, 10)}


@pytest.mark.parametrize("metric", METRICS)
def test_the_host_waits_a_few_times_a_layer_and_in_no_inner_loop(metric, device):
    one, two = (count_waits(metric, num_hidden_layers=blocks) for blocks in (1, 2))
    a_layer, a_block = WAITS[metric]
    assert 0 < two - one <= 7 * a_layer + a_block
    assert count_waits(metric, hidden_size=64, intermediate_size=272) == two  # in no loop over rows or columns
    # In no loop over batches, but where each is captured: what it is called with is compared with the one before.
    more = (count_waits(metric, samples) - two for samples in (9, 12))
    assert [extra <= 6 * batches for batches, extra in enumerate(more, 1)] == [True, True]


class Impatient(Metric):
    """Looks at each column's largest weight on the host."""

    def score(self, layer, stats):
        scale = [column.abs().max().item() for column in layer.weight.T]
        return layer.weight.abs() * max(scale)


def test_the_guard_sees_a_loop_that_waits(device):
    assert count_waits(Impatient(), hidden_size=64, intermediate_size=272) > count_waits(Impatient())


def host_threshold(monkeypatch):
    there = selection.kth_smallest
    monkeypatch.setattr(selection, "kth_smallest", lambda scores, k: there(scores, k).cpu())


def batch_not_moved(monkeypatch):
    monkeypatch.setattr(Batch, "to", lambda self, device: self)


def index_from_the_host(monkeypatch):
    monkeypatch.setattr(Batch, "places", property(lambda self: self.valid.cpu().flatten().nonzero().flatten()))


@pytest.mark.parametrize("fault", [host_threshold, batch_not_moved, index_from_the_host])
def test_the_guard_sees_what_is_on_the_wrong_side(fault, device, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((RuntimeError, PruneForgeError), match=r"a host tensor .* meets tensors on the device"):
        pruneforge.prune(small(), "wanda", 0.5, calibration=[padded("right")])
