"""An allocator that searches: what it may try, what it finds, and how it goes on after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import commands
import pytest
import torch
from conftest import interrupted_after, outcome

import pruneforge
from pruneforge import Allocator, PruneForgeError, Trials
from pruneforge.interfaces.patterns import pruned_count
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress
from pruneforge.runs.search import PruningTrials

TASK = {"data": "python-docs", "window": 64, "limit": 2}
SEEN = {"calibration": "python-docs", "samples": 2, "seqlen": 32}
SIZES = {f"block{n}": {f"block{n}.a": 30, f"block{n}.b": 70} for n in range(4)}


def worth(model, task="perplexity", **options) -> float:
    return pruneforge.evaluate(model, task, **TASK, **options)["perplexity"]


class Tries(Allocator):
    """Tries two allocations, and takes the second."""

    def allocate(self, measures, sizes, sparsity):
        return {name: sparsity for layers in sizes.values() for name in layers}

    def tilted(self, sizes, sparsity):
        last = len(sizes) - 1
        return {
            name: sparsity + 0.2 * (index / last - 0.5)
            for index, layers in enumerate(sizes.values())
            for name in layers
        }

    def search(self, trials, sizes, sparsity):
        self.told = (trials.folder, trials.seed, trials.identity)
        asked = (self.allocate({}, sizes, sparsity), self.tilted(sizes, sparsity))
        self.results = [trials.evaluate(each, "perplexity", TASK) for each in asked]
        trials.found = {"tried": len(self.results)}
        return asked[1]


@pytest.mark.parametrize(
    ("metric", "pattern", "refine"), [("wanda", None, ["sparseswaps"]), ("wanda", "4:8", []), ("sparsegpt", None, [])]
)
def test_a_trial_is_the_run_that_it_stands_for(metric, pattern, refine, tmp_path):
    asked = {"sparsity": None if pattern else 0.6, "pattern": pattern, "refine": refine, **SEEN}
    asked["refine_options"] = {"steps": 2} if refine else {}
    allocator = Tries()
    found = pruneforge.prune("demo:text", metric, output=tmp_path / "out", allocator=allocator, **asked)
    uniform = pruneforge.prune("demo:text", metric, allocator="uniform", **asked)
    assert [each["perplexity"] for each in allocator.results] == [worth(uniform), worth(found)]
    assert found.report["allocator"]["search"] == {"tried": 2}
    total = sum(mask.numel() for mask in found.masks.values())
    pruned = sum(int((~mask).sum()) for mask in found.masks.values())
    least = 1 if pattern is None else min(mask.numel() for mask in found.masks.values()) // 8
    assert 0 <= pruned_count(total, 0.5 if pattern else 0.6) - pruned < max(least, 64)
    # Nothing is left of the trials.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert allocator.told[:2] == (tmp_path / "out.search", 0)
    assert json.loads(json.dumps(allocator.told[2])) == allocator.told[2]


def test_a_model_in_memory_is_searched_as_one_from_a_folder(tmp_path):
    loaded = pruneforge.prune("demo:text", "magnitude", 0).loaded
    module, processor = loaded.module, loaded.processor
    asked = {"allocator": Tries(), "sparsity": 0.6, "metric": "magnitude"}
    dense = {name: value.clone() for name, value in module.state_dict().items()}
    streamed = pruneforge.prune("demo:text", output=tmp_path / "out", **asked)
    told = asked["allocator"].results
    found = pruneforge.prune(module, processor=processor, **asked)
    assert [each["perplexity"] for each in asked["allocator"].results] == [each["perplexity"] for each in told]
    assert asked["allocator"].told[0] is None
    for name, mask in streamed.masks.items():
        assert torch.equal(found.masks[name], mask)
        assert torch.equal(module.state_dict()[f"{name}.weight"], dense[f"{name}.weight"] * mask)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_trial_is_compared_with_the_model_that_the_run_prunes(streamed, tmp_path):
    class Compares(Tries):
        def search(self, trials, sizes, sparsity):
            self.result = trials.evaluate(self.allocate({}, sizes, sparsity), "agreement", TASK)
            return self.allocate({}, sizes, sparsity)

    allocator = Compares()
    output = tmp_path / "out" if streamed else None
    found = pruneforge.prune("demo:text", "magnitude", 0.6, allocator=allocator, output=output)
    expected = pruneforge.evaluate(found, "agreement", **TASK)
    assert 0 < allocator.result["agreement"] == expected["agreement"] < 1
    assert allocator.result["warnings"] == []  # of another dense model


def test_runs_of_one_pass_are_searched_each_on_its_own(tmp_path):
    asked = {"allocator": Tries(), **SEEN}
    together = pruneforge.prune_each("demo:text", "wanda", [0.4, 0.6], output=tmp_path / "all", **asked)
    alone = pruneforge.prune("demo:text", "wanda", 0.4, propagate="dense", **asked)
    assert all(torch.equal(together["0.4"].masks[name], mask) for name, mask in alone.masks.items())
    assert asked["allocator"].told[0] is None


def test_observers_of_runs_hear_nothing_of_trials():
    heard = []

    class Listens:
        @pruneforge.hookimpl
        def pruneforge_block_pruned(self, result):
            heard.append(result.index)

        @pruneforge.hookimpl
        def pruneforge_run_finished(self, report):
            heard.append("finished")

    listener = Listens()
    loaded_plugins().register(listener)
    try:
        pruneforge.prune("demo:text", "magnitude", 0.6, allocator=Tries())
    finally:
        loaded_plugins().unregister(listener)
    assert heard == [*range(len(heard) - 1), "finished"]


def test_a_search_is_refused_beside_model_scope_and_in_several_processes(tmp_path):
    with pytest.raises(PruneForgeError, match=r"scope=model chooses each layer's sparsity itself, and so does"):
        pruneforge.prune("nowhere", "magnitude", 0.5, options={"scope": "model"}, allocator=Tries())
    file = tmp_path / "tries.py"
    file.write_text(
        "from pruneforge import Allocator\n\n\nclass Tries(Allocator):\n"
        "    def allocate(self, measures, sizes, sparsity):\n        return {}\n\n"
        "    def search(self, trials, sizes, sparsity):\n        return {}\n"
    )
    asked = ("prune", "demo:text", "-p", file, "--metric", "magnitude", "--allocator", "tries", "--output")
    for done in commands.run_together(2, *asked, tmp_path / "out"):
        assert done.returncode == 2, done.stderr
        assert "'tries' searches, which takes one process" in done.stderr
    done = commands.run(*asked, tmp_path / "out")
    assert done.returncode == 2
    assert "gives layer 'model.layers.0.self_attn.q_proj' the sparsity None" in done.stderr
    assert not (tmp_path / "out").exists()


# From here on with Optuna.


@pytest.fixture
def search():
    pytest.importorskip("optuna", reason="needs the extra 'search'")

    def made(task="perplexity", task_options=TASK, **options):
        return pruneforge.create("allocator", "search", task=task, task_options=task_options, **options)

    return made


class Paraboloid(Trials):
    """Trials that are worth the squared distance from an allocation, in levels, without any model."""

    def __init__(self, folder: Path | None, target: dict[str, int], seed: int = 0, stop: int | None = None):
        self.folder, self.seed, self.identity, self.progress, self.found = folder, seed, {"model": "a"}, Progress(), {}
        self.target, self.stop, self.seen = target, stop, []

    def evaluate(self, allocation, task, options):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        levels = {name.split(".")[0]: round((share - 0.5) / 0.05) for name, share in allocation.items()}
        assert sum(levels.values()) == 0
        assert all(abs(level) <= 3 for level in levels.values())
        self.seen.append(levels)
        return {"perplexity": float(sum((levels[name] - to) ** 2 for name, to in self.target.items()))}


def test_it_finds_the_best_of_all_allocations(search):
    target = {"block0": -2, "block1": 3, "block2": 0, "block3": -1}
    trials = Paraboloid(None, target)
    found = search(trials=60).search(trials, SIZES, 0.5)
    assert found == pytest.approx({f"{b}.{la}": 0.5 + 0.05 * level for b, level in target.items() for la in "ab"})
    assert trials.seen[0] == dict.fromkeys(SIZES, 0)
    assert trials.found == {"trials": 60, "measure": "perplexity", "uniform": 14.0, "best": 0.0, "levels": target}
    # None comes twice while there are others nearby.
    assert len({tuple(levels.items()) for levels in trials.seen[:40]}) == 40
    # Each child differs from the best before it by one to three exchanges.
    costs = [sum((levels[name] - to) ** 2 for name, to in target.items()) for levels in trials.seen]
    for number in range(1, 40):
        parent = trials.seen[min(range(number), key=costs.__getitem__)]
        moved = [trials.seen[number][name] - parent[name] for name in SIZES]
        assert 1 <= sum(map(abs, moved)) / 2 <= 3


@pytest.mark.parametrize("stop", [0, 7])
def test_one_that_was_killed_ends_as_one_that_was_not(search, stop, tmp_path):
    target = {"block0": -3, "block1": 3, "block2": 1, "block3": -1}
    whole, first = Paraboloid(None, target, seed=5), Paraboloid(tmp_path / "search", target, 5, stop)
    expected = search(trials=9).search(whole, SIZES, 0.5)
    with pytest.raises(KeyboardInterrupt):
        search(trials=9).search(first, SIZES, 0.5)
    second = Paraboloid(tmp_path / "search", target, 5)
    assert search(trials=9).search(second, SIZES, 0.5) == expected
    assert first.seen + second.seen == whole.seen
    assert second.found == whole.found
    # More trials go on from there, and fewer are the first of them.
    more, fewer = (Paraboloid(tmp_path / "search", target, 5) for _ in range(2))
    search(trials=11).search(more, SIZES, 0.5)
    assert (len(more.seen), more.found["trials"]) == (2, 11)
    search(trials=1).search(fewer, SIZES, 0.5)
    assert (fewer.seen, fewer.found["best"]) == ([], whole.found["uniform"])


def test_another_search_in_the_folder_is_refused(search, tmp_path):
    trials = Paraboloid(tmp_path / "search", dict.fromkeys(SIZES, 0))
    search(trials=2).search(trials, SIZES, 0.5)
    trials.identity = {"model": "b"}
    with pytest.raises(PruneForgeError, match="is another one, which differs in model, step; remove that folder"):
        search(trials=2, step=0.1).search(trials, SIZES, 0.5)


def test_trials_that_give_no_number_lose(search):
    class Nan(Paraboloid):
        def evaluate(self, allocation, task, options):
            value = super().evaluate(allocation, task, options)["perplexity"]
            return {"perplexity": value if len(self.seen) == 2 else math.nan}

    trials = Nan(None, dict.fromkeys(SIZES, 0))
    search(trials=4).search(trials, SIZES, 0.5)
    assert trials.found["levels"] == trials.seen[1]


def test_what_cannot_be_searched_is_said_before_anything_is_loaded(search):
    for allocator, options, why in [
        ("search", {}, r"option task of search: field required"),
        ("search:nothing", {}, r"evaluator 'nothing'"),
        ("search:perplexity", {}, r"option data of perplexity"),
        ("search:perplexity", {"task_options": {**TASK, "windows": 1}}, r"option of perplexity 'windows'"),
    ]:
        with pytest.raises(PruneForgeError, match=why):
            pruneforge.prune("nowhere", "magnitude", 0.5, allocator=allocator, allocator_options=options)
    with pytest.raises(PruneForgeError, match="there is nothing to search: 1 blocks"):
        search().search(Paraboloid(None, {}), {"block0": SIZES["block0"]}, 0.5)
    with pytest.raises(PruneForgeError, match=r"levels from 0 to 3 around sparsity 0\.01"):
        search().search(Paraboloid(None, {}), SIZES, 0.01)


def test_two_blocks_at_their_limits_still_have_children(search):
    sizes = {name: SIZES[name] for name in ("block0", "block1")}
    trials = Paraboloid(None, {"block0": 3, "block1": -3})
    search(trials=12).search(trials, sizes, 0.5)
    assert trials.found["levels"] == trials.target


@pytest.mark.parametrize("task", ["perplexity", "agreement"])
def test_the_result_is_never_worse_than_uniform(search, task, tmp_path):
    asked = {**SEEN, "sparsity": 0.6, "metric": "wanda"}
    found = pruneforge.prune("demo:text", output=tmp_path / "out", allocator=search(task, trials=4), **asked)
    uniform = pruneforge.prune("demo:text", allocator="uniform", **asked)
    told = found.report["allocator"]["search"]
    measure = told["measure"]
    values = [pruneforge.evaluate(each, task, **TASK)[measure] for each in (uniform, tmp_path / "out")]
    assert [told["uniform"], told["best"]] == values
    assert values[1] >= values[0] if task == "agreement" else values[1] <= values[0]
    assert sum(told["levels"].values()) == 0


def test_a_killed_run_goes_on_with_its_trials_and_gives_the_same_bytes(search, tmp_path, monkeypatch):
    asked = {"metric": "magnitude", "sparsity": 0.6, "allocator": "search:perplexity"}
    asked["allocator_options"] = {"task_options": TASK, "trials": 4}
    whole = pruneforge.prune("demo:text", output=tmp_path / "whole", **asked)
    evaluated, evaluate = [], PruningTrials.evaluate

    def killed(self, *args):
        evaluated.append(1)
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return evaluate(self, *args)

    monkeypatch.setattr(PruningTrials, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        pruneforge.prune("demo:text", output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    with interrupted_after(1):
        pruneforge.prune("demo:text", output=tmp_path / "out", **asked)
    assert len(evaluated) == 5  # two, the one that was interrupted, and two
    pruneforge.prune("demo:text", output=tmp_path / "out", resume=True, **asked)
    assert len(evaluated) == 5
    assert outcome(tmp_path / "out") == outcome(whole.folder)
    (tmp_path / "other.search").symlink_to(tmp_path / "out.search")
    with pytest.raises(PruneForgeError, match="differs in sparsity;"):
        pruneforge.prune("demo:text", output=tmp_path / "other", **{**asked, "sparsity": 0.5})
    assert not (tmp_path / "other").exists()


def test_options_of_the_search_are_options_of_the_command(search, tmp_path):
    asked = ("prune", "demo:text", "--metric", "magnitude", "--sparsity", "0.6", "--allocator", "search:perplexity")
    options = ("--task-option", "data=python-docs", "--task-option", "window=64", "--task-option", "limit=2")
    done = commands.run(*asked, *options, "--trials", "2", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert pruneforge.load(tmp_path / "out").report["allocator"]["search"]["trials"] == 2
