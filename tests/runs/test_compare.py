"""The same pruning of a language model and a vision transformer, in one table."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from typer.testing import CliRunner

import pruneforge
from pruneforge.cli import app

CASES = [
    {
        "model": "demo:text",
        "calibration": "python-docs",
        "task": "perplexity",
        "task_options": {"data": "python-docs", "window": 64, "limit": 20},
        "samples": 8,
        "seqlen": 64,
        "name": "text",
    },
    {
        "model": "demo:image",
        "calibration": "digits",
        "task": "imagenet",
        "task_options": {"data": "digits", "workers": 0},
        "samples": 16,
        "name": "image",
    },
]


def test_one_call_compares_a_language_model_and_a_vision_transformer():
    cases = [pruneforge.Case(**case) for case in CASES]
    rows = pruneforge.compare(cases, ["wanda"], pattern="2:4")
    assert [(row["model"], row["metric"], row["pattern"]) for row in rows] == [
        ("text", "wanda", "2:4"),
        ("image", "wanda", "2:4"),
    ]
    for row in rows:
        assert row["sparsity"] == 0.5
        assert row["loss_increase"] == pytest.approx(row["loss"] / row["dense_loss"] - 1)
        assert row["loss_increase"] > 0
    text, image = rows
    assert math.exp(text["loss"]) == pytest.approx(text["results"]["perplexity"])
    assert text["accuracy_lost"] is None
    lost = image["classes_lost"]
    assert lost
    assert list(lost.values()) == sorted(lost.values(), reverse=True)
    dense = pruneforge.evaluate("demo:image", "imagenet", options=CASES[1]["task_options"])
    for name, share in lost.items():
        now = image["results"]["class_accuracy"][name]
        assert share == pytest.approx(dense["class_accuracy"][name] - now, abs=1e-5)
    assert image["accuracy_lost"] == pytest.approx(dense["top1"] - image["accuracy"])


def test_the_command_prints_one_table(tmp_path):
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(CASES))
    done = CliRunner().invoke(app, ["compare", str(file), "--metric", "magnitude", "--sparsity", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    assert [row["model"] for row in json.loads(done.stdout)] == ["text", "image"]
    shown = CliRunner().invoke(app, ["compare", str(file), "--metric", "magnitude"])
    assert shown.exit_code == 0
    assert "magnit" in shown.stdout
    for content, said in [("- {model: a, typo: b}", "typo"), ("[", "cannot be read"), ("3", "cannot be read")]:
        file.write_text(content)
        failed = CliRunner().invoke(app, ["compare", str(file), "--metric", "magnitude"])
        assert failed.exit_code == 2
        assert said in failed.output
        assert len(failed.output.strip().splitlines()) == 1
