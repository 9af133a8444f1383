"""Records of the items that an evaluation measured: in the results or in a file, and never in a report."""

from __future__ import annotations

import json
import os

import pytest
from commands import invoke

import pruneforge
from pruneforge import Evaluator, PruneForgeError
from pruneforge.plugins import loaded_plugins

ASKED = {"data": "python-docs", "window": 32, "limit": 4}
GIVEN = ("--data", "python-docs", "--window", "32", "--limit", "4")


def test_a_file_gets_one_line_an_item_and_true_returns_the_same(checkpoint, tmp_path):
    file = tmp_path / "items.jsonl"
    written = pruneforge.evaluate(checkpoint, "perplexity", **ASKED, items=file)
    returned = pruneforge.evaluate(checkpoint, "perplexity", **ASKED, items=True)
    plain = pruneforge.evaluate(checkpoint, "perplexity", **ASKED)
    items = returned.pop("items")
    assert written == returned == plain
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"id": str(number), "loss": loss} for number, loss in enumerate(items["loss"])]
    assert len(rows) == 4
    assert list(tmp_path.iterdir()) == [file]


def test_items_stand_neither_in_the_report_of_a_folder_nor_in_the_file_of_results(checkpoint, tmp_path):
    folder, output = tmp_path / "pruned", tmp_path / "results.json"
    pruneforge.prune(checkpoint, "magnitude", 0.5, output=folder)
    found = pruneforge.evaluate(folder, "perplexity", **ASKED, items=True, output=output)
    assert len(found.pop("items")["id"]) == 4
    assert pruneforge.load(folder).report["evaluation"] == [found]
    assert json.loads(output.read_text()) == found


def test_only_earlier_results_are_replaced_unless_it_is_forced(checkpoint, tmp_path):
    weights, fifo = tmp_path / "model.safetensors", tmp_path / "fifo"
    weights.write_bytes((checkpoint / "model.safetensors").read_bytes())
    os.mkfifo(fifo)
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": "1", "text": "mine"}\n')
    for asked in ({"output": weights}, {"items": data}, {"output": checkpoint / "config.json"}):
        (file,) = asked.values()
        before = file.read_bytes()
        with pytest.raises(PruneForgeError, match="is there already, and is no result of an evaluation"):
            pruneforge.evaluate(checkpoint, "perplexity", **ASKED, **asked)
        assert file.read_bytes() == before
    with pytest.raises(PruneForgeError, match="is no file but a device or the like"):
        pruneforge.evaluate(checkpoint, "perplexity", **ASKED, output=fifo, force=True)
    for limit in (3, 4):  # the second time over the first one's results
        output = tmp_path / "results.json"
        found = pruneforge.evaluate(checkpoint, "perplexity", **{**ASKED, "limit": limit}, output=output)
        assert json.loads(output.read_text()) == found
    done = invoke("eval", checkpoint, "--task", "perplexity", *GIVEN, "--output", weights)
    assert (done.exit_code, "pass --force" in done.output) == (2, True), done.output
    done = invoke("eval", checkpoint, "--task", "perplexity", *GIVEN, "--output", weights, "--force")
    assert done.exit_code == 0, done.output
    assert json.loads(weights.read_text())["windows"] == 4


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"items": "missing/items.jsonl"}, "cannot write"),
        ({"items": "."}, "cannot write"),
        ({"items": "same.json", "output": "same.json"}, "cannot both be written to 'same.json'"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_anything_runs(tmp_path, monkeypatch, files, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.evaluate("no-such/model/anywhere", "perplexity", **ASKED, **files)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_fails_leaves_no_file_and_an_older_one_as_it_was(checkpoint, tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text("of another run\n")
    with pytest.raises(PruneForgeError, match="longer than the model's context"):
        pruneforge.evaluate(checkpoint, "perplexity", data="python-docs", window=4096, items=file, force=True)
    assert file.read_text() == "of another run\n"
    assert list(tmp_path.iterdir()) == [file]


class Plain(Evaluator):
    """One number and no items."""

    def evaluate(self, subject):
        return {"loss": 1.0}


def test_an_evaluator_without_items_is_said_to_have_none(checkpoint, tmp_path):
    registry = loaded_plugins().registry
    registry.plugin = "test"
    registry.evaluator("plain", Plain)
    try:
        found = pruneforge.evaluate(checkpoint, "plain", items=tmp_path / "items.jsonl")
    finally:
        registry.drop("test")
    assert found["warnings"] == ["evaluator 'plain' keeps no record of its items, so there is none"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_items(checkpoint, tmp_path):
    file = tmp_path / "items.jsonl"
    task = ("--task", "perplexity", "--data", "python-docs", "--window", 32, "--limit", 2)
    done = invoke("eval", checkpoint, *task, "--items", file, "--json")
    assert done.exit_code == 0, done.output
    losses = [json.loads(line)["loss"] for line in file.read_text().splitlines()]
    assert sum(losses) / 2 == pytest.approx(json.loads(done.output)["loss"])
    assert "items" not in json.loads(done.output)
    done = invoke("eval", checkpoint, *task, "--items", tmp_path / "nowhere" / "items.jsonl")
    assert (done.exit_code, "cannot write" in done.output) == (2, True)


@pytest.mark.parametrize("content", ["{", '{"format": 0}'])
def test_an_evaluation_is_not_lost_for_a_report_that_was_damaged_meanwhile(content, checkpoint, tmp_path):
    folder, output = tmp_path / "pruned", tmp_path / "results.json"
    pruneforge.prune(checkpoint, "magnitude", 0.5, output=folder)

    class Damages(Evaluator):
        def evaluate(self, subject):
            (folder / "pruneforge.json").write_text(content)
            return {"value": 1.5}

    loaded_plugins().registry.evaluator("damages", Damages)
    try:
        found = pruneforge.evaluate(folder, "damages", output=output)
    finally:
        loaded_plugins.cache_clear()
    assert found["value"] == 1.5
    (warning,) = found["warnings"]
    assert warning.startswith(f"the evaluation could not be added to {str(folder / 'pruneforge.json')!r}: ")
    assert json.loads(output.read_text()) == found
