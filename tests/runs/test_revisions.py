"""Models of the Hub at a revision, read from a cache as the Hub's library lays it out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import invoke
from conftest import tiny_llama
from safetensors.torch import load_file

from pruneforge.runs.places import hub_id, split_revision

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache of a model with two commits: `main` is the new one, and a tag is the old one."""
    home = tmp_path / "cache" / "models--org--tiny"
    for seed, commit in enumerate((OLD, NEW)):
        saved = tmp_path / commit
        tiny_llama(torch.float32, seed=seed).save_pretrained(saved)
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (home / "blobs").mkdir(exist_ok=True)
        for file in saved.iterdir():
            blob = home / "blobs" / f"{commit}{file.name}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(NEW)
    (home / "refs" / "v1").write_text(OLD)
    return tmp_path / "cache"


def prune(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(cache, "prune", *arguments, "--metric", "magnitude")


def run(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that takes the cache from its environment."""
    command = [sys.executable, "-m", "pruneforge", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_revision_is_pruned_and_its_commit_is_in_the_report(cache, tmp_path):
    for number, (arguments, commit) in enumerate(
        [(("org/tiny",), NEW), (("org/tiny", "--revision", "v1"), OLD), ((f"org/tiny@{OLD}",), OLD)]
    ):
        output = tmp_path / f"out-{number}"
        done = prune(cache, *arguments, "--output", output)
        assert done.returncode == 0, done.stderr
        report = json.loads((output / "pruneforge.json").read_text())
        assert report["model"]["commit"] == commit
        dense, pruned = (load_file(folder / "model.safetensors") for folder in (tmp_path / commit, output))
        name = "model.layers.0.mlp.up_proj.weight"
        kept = pruned[name] != 0
        assert torch.equal(pruned[name][kept], dense[name][kept])
        assert kept.float().mean() == 0.5
    assert report["recipe"]["model"] == f"org/tiny@{OLD}"
    missing = prune(cache, "org/tiny@v2", "--output", tmp_path / "none")
    assert missing.returncode == 2
    (line,) = missing.stderr.strip().splitlines()
    assert "model 'org/tiny' cannot be downloaded at revision 'v2'" in line


def test_a_revision_is_evaluated(cache, tmp_path):
    """By a plugin's evaluator, since these models have no tokenizer."""
    plugin = tmp_path / "first.py"
    plugin.write_text(
        "from pruneforge import Evaluator\n"
        "class First(Evaluator):\n"
        "    def evaluate(self, subject):\n"
        "        weight = next(subject.model.module.parameters())\n"
        "        return {'first': float(weight.flatten()[0])}\n"
    )
    for revision, commit in ((None, NEW), ("v1", OLD)):
        asked = ("org/tiny", *(("--revision", revision) if revision else ()), "--task", "first", "-p", plugin, "--json")
        done = run(cache, "eval", *asked)
        assert done.returncode == 0, done.stderr
        weights = load_file(tmp_path / commit / "model.safetensors")
        assert json.loads(done.stdout)["first"] == float(weights["model.embed_tokens.weight"].flatten()[0])
    refused = run(cache, "eval", tmp_path / OLD, "--revision", "v1", "--task", "first", "-p", plugin)
    assert (refused.returncode, "--revision is for a hub id" in refused.stderr) == (2, True)


def test_what_follows_an_at_sign_is_a_revision_of_a_hub_id_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_revision("org/name@v1") == ("org/name", "v1")
    assert hub_id("org/name@v1") == hub_id("hf-hub:org/name@v1") == "org/name"
    for other in ("org/name", "org/name@", "./folder@v1", "a/b/c@v1"):
        assert split_revision(other) == (other, None)
    Path("org").mkdir()
    Path("org/name@v1").mkdir()
    assert split_revision("org/name@v1") == ("org/name@v1", None)
    for model in ("./folder", "demo:text", "org/name@v2"):
        done = invoke("prune", model, "--metric", "magnitude", "--revision", "v1", "--output", "out")
        assert (done.exit_code, "--revision is for a hub id" in done.output) == (2, True)
