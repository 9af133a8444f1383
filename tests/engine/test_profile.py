"""Where time and memory went."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_llama, tokens
from torch import nn

import pruneforge
from pruneforge.engine.recorder import InputRecorder
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import find_layers
from pruneforge.interfaces.summaries import ColumnSquares


@pytest.mark.parametrize("metric", ["wanda", "gblm"])
def test_a_profile_has_every_stage_of_every_block_and_opens_as_a_trace(metric, tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    result = pruneforge.prune(
        tmp_path / "model", metric, 0.5, None, tokens().split(2), output=tmp_path / "out", profile=True
    )
    rows = {(row["stage"], row["block"]): row for row in result.report["measured"]["profile"]}
    for block in range(3):
        assert {stage for stage, of in rows if of == block} >= {"read", "calibrate", "prune", "write"}
    assert [block for stage, block in rows if stage == "propagate"] == [0, 1]
    within = [row["seconds"] for (stage, _), row in rows.items() if stage in ("calibrate", "propagate", "prune")]
    assert sum(within) < rows["total", None]["seconds"]
    assert rows["total", None]["host_bytes"] > 50e6  # Python and torch alone take more
    trace = json.loads((tmp_path / "out" / "profile.json").read_text())["traceEvents"]
    spans = [event for event in trace if event["ph"] == "X"]
    assert sum(event["dur"] for event in spans if event["cat"] == "calibrate") == pytest.approx(
        1e6 * result.report["measured"]["seconds"]["calibrate"], abs=1e3
    )
    assert all({"name", "ph", "ts", "dur", "pid", "tid"} <= set(event) for event in spans)
    assert len({event["tid"] for event in spans}) == 3  # blocks are read by a thread of their own, written by another
    counters = [event for event in trace if event["ph"] == "C"]
    assert counters
    assert all(event["args"]["MiB"] > 50 for event in counters)


def test_without_a_profile_nothing_is_left_behind(tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    result = pruneforge.prune(tmp_path / "model", "magnitude", 0.5, output=tmp_path / "out")
    assert "profile" not in result.report["measured"]
    assert not (tmp_path / "out" / "profile.json").exists()
    assert result.profile.samples == []


def test_the_calibration_pass_ends_before_the_last_product():
    model, made = tiny_llama(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: made.append(1))
    pruneforge.prune(model, "wanda", 0.5, None, tokens().split(1))
    # Once to learn what a block returns, once in the first calibration pass, and six times to propagate.
    assert len(made) == 1 + 1 + 6
    made.clear()
    pruneforge.prune(model, "wanda", 0.5, None, tokens().split(1), propagate="dense")
    assert len(made) == 1 + 6


class Twice(nn.Module):
    """Uses one of its weights twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.first(self.second(self.first(hidden)))


class Routed(nn.Module):
    """Sends a batch to one of two weights, or to both."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        low, high = hidden[hidden[..., 0] < 0], hidden[hidden[..., 0] >= 0]
        return torch.cat([self.low(low) if len(low) else low, self.high(high) if len(high) else high])


class Sometimes(nn.Module):
    """Uses a weight twice when the first value is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        once = self.first(hidden)
        return self.second(self.first(once) if hidden[0, 0] > 0 else once)


@pytest.mark.parametrize("module", [Twice(), Routed(), Sometimes()])
def test_a_pass_that_may_reach_a_layer_again_is_never_cut_short(module):
    layers = find_layers(module, "block")
    block = Block("block", module, tuple(layers))
    whole, cut = (InputRecorder(block, [ColumnSquares], stop=stop) for stop in (False, True))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(6, 4, generator=generator) for _ in range(4)]
    inputs[0][:, 0] = -inputs[0][:, 0].abs()  # the first batch shows one way only
    for value in inputs:
        for recorder in (whole, cut):
            with recorder.recording(Batch({}, size=1)), torch.no_grad():
                module(value)
    for layer in layers:
        found, expected = (recorder.statistics(layer)[0][ColumnSquares] for recorder in (cut, whole))
        assert found.tokens == expected.tokens
        assert torch.equal(found.total, expected.total)


def test_a_block_without_layers_is_run_once():
    model, dense = tiny_llama(), tiny_llama()
    result = pruneforge.prune(model, "wanda", 0.5, None, tokens().split(2), exclude=["model.layers.1.*"])
    spans = [(span.stage, span.block) for span in result.profile.spans]
    assert spans.count(("calibrate", 1)) == 0
    assert spans.count(("propagate", 0)) == spans.count(("propagate", 1)) == spans.count(("calibrate", 2)) == 3
    for ours, theirs in zip(model.model.layers[1].parameters(), dense.model.layers[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # Block 2 saw what the pruned block 0 and the dense block 1 make of the tokens.
    seen = []
    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens())
    score = dense.model.layers[2].self_attn.q_proj.weight.abs() * seen[0].flatten(0, 1).norm(dim=0)
    kept = result.masks["model.layers.2.self_attn.q_proj"]
    assert (score.masked_fill(~kept, torch.inf).min(1).values >= score.masked_fill(kept, 0).max(1).values).all()
