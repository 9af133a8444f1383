"""What processes tell one another: statistics with a merge of their own, and errors of any kind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from pruneforge.engine.processes import Group

RUN = """
import json, os, sys
import torch
from pruneforge.engine.processes import joined
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.statistics import InputStatistic

class Largest(InputStatistic):
    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)
    def add(self, inputs):
        self.total = torch.maximum(self.total, inputs.abs().amax(0))
    def merge(self, other):
        self.total = torch.maximum(self.total, other.total)
        self.samples += other.samples
        self.tokens += other.tokens

class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

host, told = torch.device("cpu"), []
with joined(host) as group:
    statistic = Largest((1, 3), torch.float32, host)
    statistic.update(torch.tensor([[1.0, -5.0, 2.0], [4.0, 0.0, 0.0]]) * (group.rank + 1), 1)
    group.merge(statistic, host)
    for failing in (None, PruneForgeError("layer 'x' does not fit"), Unpicklable("this", "that")):
        try:
            found = group.agree(failing if group.rank == 1 else None, {str(group.rank): 1})
            told.append(sorted(found))
        except Exception as error:
            told.append([type(error).__name__, str(error)])
    print(json.dumps([statistic.total.tolist(), statistic.samples, statistic.tokens, told]))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_merge_and_fail_together():
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks)
    for found in (first, second):
        assert found[:3] == [[8.0, 10.0, 4.0], 2, 4]  # the larger of both processes' values
    refused = ["PruneForgeError", "layer 'x' does not fit"]
    assert first[3] == [
        ["0", "1"],
        refused,
        ["UnfinishedError", "process 1 of the run failed: Unpicklable: this and that"],
    ]
    assert second[3] == [["0", "1"], refused, ["Unpicklable", "this and that"]]


def test_a_process_that_works_alone_raises_its_own_error():
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        Group().agree(torch.OutOfMemoryError("full"), {})
    assert Group().agree(None, {"a": 1}) == {"a": 1}
