"""What a run measures of each layer: against the layer's outputs, taken by hooks from the model itself."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from conftest import interrupted_after, outcome, tiny_llama, tokens

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.engine.details import BINS, described


@pytest.fixture
def model(tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def errors_of(dense, pruned, samples) -> dict[str, float]:
    """`||X (W - W')^T||^2 / ||X W^T||^2` of every layer, with the inputs of the dense model."""
    kind, found = reference.LanguageModel, {}
    for name, block in kind.blocks(dense):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(kind, dense, layers, samples)
        for layer, module in layers:
            rows = torch.cat(inputs[layer])
            after = rows @ pruned.get_submodule(layer).weight.detach().double().T
            before = rows @ module.weight.double().T
            found[layer] = ((before - after).square().sum() / before.square().sum()).item()
    return found


@pytest.mark.parametrize(
    "method", [{"metric": "magnitude"}, {"metric": "sparsegpt"}, {"metric": "wanda", "recover": "ridge"}]
)
def test_the_error_of_a_layer_is_that_of_its_output(method):
    dense, ids = tiny_llama(), tokens()
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    found = pruneforge.prune(tiny_llama(), sparsity=0.5, calibration=[ids], propagate="dense", details=True, **method)
    expected = errors_of(dense, found.model, samples)
    measured = {name: layer["error"] for name, layer in found.report["layers"].items()}
    assert measured == pytest.approx(expected, rel=1e-9)
    scored = {layer["scores"] is not None for layer in found.report["layers"].values()}
    assert scored == {method["metric"] != "sparsegpt"}  # which has no score of the dense weight


def test_details_change_no_weight_and_survive_an_interruption(model, tmp_path):
    def run(name, details=True, **more):
        return pruneforge.prune(
            model, "wanda", 0.5, None, tokens().split(3), output=tmp_path / name, details=details, **more
        )

    whole, plain = run("whole"), run("plain", details=False)
    with interrupted_after(1):
        run("stopped")
    resumed = run("stopped", resume=True)
    assert resumed.report["layers"] == whole.report["layers"]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    files = [path.name for path in (tmp_path / "plain").iterdir() if path.name != "pruneforge.json"]
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
    assert all("error" not in layer for layer in plain.report["layers"].values())


def test_runs_of_one_pass_have_each_their_own(model, tmp_path):
    settings = {"samples": 6, "calibration": tokens().split(3), "details": True, "propagate": "dense"}
    together = pruneforge.prune_each(model, ["wanda", "magnitude"], [0.5, 0.7], output=tmp_path / "all", **settings)
    alone = pruneforge.prune(model, "magnitude", 0.7, output=tmp_path / "one", **settings)
    assert together["magnitude-0.7"].report["layers"] == alone.report["layers"]
    assert together["wanda-0.5"].report["layers"] != together["wanda-0.7"].report["layers"]


def test_details_need_calibration_data(model):
    with pytest.raises(PruneForgeError, match="`details`, the error of each layer, needs calibration data"):
        pruneforge.prune(model, "magnitude", 0.5, details=True)


def test_scores_are_counted_in_equal_bins_of_their_logarithm():
    score = torch.tensor([[1.0, 10.0, 100.0, 1e4], [0.0, 1.0, 1.0, 1e4]])
    found = described(score)
    assert (found["low"], found["high"], found["others"], found["weights"]) == (0.0, 4.0, 1, 8)
    expected = [0] * BINS
    for value in score[score > 0].tolist():
        expected[min(int(math.log10(value) / 4 * BINS), BINS - 1)] += 1
    assert found["counts"] == expected
    mean = score.mean()
    total = (score - mean).square().sum()
    assert found["rows"] == pytest.approx(float(4 * (score.mean(1) - mean).square().sum() / total))
    assert found["columns"] == pytest.approx(float(2 * (score.mean(0) - mean).square().sum() / total))
    assert described(torch.ones(2, 2))["counts"] == [4]
    assert described(torch.zeros(2, 2))["others"] == 4
    assert described(torch.tensor([[1.0, torch.inf]])) is None
