"""What a run says of memory that is full."""

from __future__ import annotations

import pytest
import torch

from pruneforge.errors import UnfinishedError
from pruneforge.memory import one_line_for_full_devices


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
