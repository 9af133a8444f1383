"""What a run says of memory that is full."""

from __future__ import annotations

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


def test_a_model_in_memory_is_not_pruned_twice(hungry):
    hungry(2)
    model = pruneforge.prune("demo:text", "magnitude", 0.0).model
    with pytest.raises(UnfinishedError, match="the device has no room left"):
        pruneforge.prune(model, "hungry", 0.5, None, [torch.ones(8, 32, dtype=torch.int64)])
