"""Every first-party plugin keeps its promises, and each check catches a plugin that breaks its promise."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from pruneforge import NM, Allocator, ColumnSquares, Gram, Metric, Pruned, PruneForgeError, Refiner
from pruneforge.plugins import Plugins
from pruneforge.testing import checks_for, parametrize_with_checks, run_checks
from pruneforge.testing.samples import sample


def first_party():
    plugins = Plugins()
    plugins.load_installed()
    registry = plugins.registry
    made = [registry.create(kind, entry.name) for kind in ("metric", "refiner") for entry in registry.entries(kind)]
    optionless = [entry for entry in registry.entries("allocator") if entry.name not in ("file", "search")]
    made += [registry.create("allocator", entry.name) for entry in optionless]
    if registry.get("allocator", "search").lacking() is None:  # of an optional library
        task = {"task": "perplexity", "task_options": {"data": "python-docs"}}
        made.append(registry.create("allocator", "search", task))
    made += [registry.create("metric", "gblm", {"norm": "l2"}), registry.create("metric", "gblm", {"alpha": 0})]
    made += [
        registry.create("metric", "admm", {"schedule": "constant"}),
        registry.create("metric", "admm", {"scope": "row"}),
    ]
    made += [registry.create("allocator", "alphapruning", {"fit": "mid", "per": "layer", "eps": 0.9})]
    made += [registry.create("allocator", "lsa", {"per": "layer", "redundant": "low", "b": 0.5})]
    made.append(registry.create("metric", "gaprune", {"score": "fisher"}))
    made += [registry.create("metric", "ria", {"permutation": how}) for how in ("snake", "assignment")]
    return [*made, registry.create("metric", "ria", {"a": 1.0}), registry.create("allocator", "owl", {"m": 1.5})]


@parametrize_with_checks(
    first_party(),
    {"random": {"rows are pruned alike": "each weight has a random number of its place"}},
)
def test_first_party_plugins_keep_their_promises(check):
    assert check.run() is None  # it raises otherwise


class Good(Metric):
    def score(self, layer, stats):
        return layer.weight.abs()


def scoring(score, **attributes):
    return type("Broken", (Metric,), {"score": staticmethod(score), **attributes})()


def pruning(prune_layer, **attributes):
    return type("Broken", (Metric,), {"prune_layer": staticmethod(prune_layer), **attributes})()


def half(layer, pattern):
    return pattern.select(layer.weight.abs())


class First(ColumnSquares):
    """Remembers the size of its first batch, which merging does not tell."""

    def add(self, inputs):
        super().add(inputs)
        self.first = getattr(self, "first", len(inputs))


def in_order(layer):
    """Other scores, which make another mask."""
    return layer.weight.abs() * torch.arange(layer.weight.shape[1])


def by_first(tokens):
    return lambda layer, stats: in_order(layer) if stats[First].first > tokens else layer.weight.abs()


def by_hash(layer, stats):
    generator = torch.Generator().manual_seed(hash(layer.name) % 2**32)
    return layer.weight.abs() * torch.rand(layer.weight.shape[1], generator=generator)


def never_two_of_four(layer, stats, pattern):
    if isinstance(pattern, NM) and layer.name != sample().layer().name:
        raise ValueError("not in a model")
    return Pruned(half(layer, pattern))


class NotByLayer(Metric):
    def score(self, layer, stats):
        if self.options.scope == "layer":
            raise ValueError("not this scope")
        return layer.weight.abs()


def on_the_cpu_alone(layer, stats):
    return layer.weight.abs() if layer.weight.device.type == "cpu" else in_order(layer)


def one_layer_fails(layer, stats):
    if torch.equal(layer.weight, sample(seed=2).weight):
        raise ValueError("not this one")
    return layer.weight.abs()


CALLS = itertools.count()


def by_calls(layer, stats):
    return in_order(layer) if next(CALLS) % 2 else layer.weight.abs()


def spoils(layer, stats):
    layer.weight.mul_(2)
    return layer.weight.abs()


def strict(layer, stats):
    norm = stats[ColumnSquares].total
    if (norm == 0).any():
        raise ValueError("dead input")
    return layer.weight.abs() * norm


def float_only(layer, stats):
    if layer.parameter.dtype in (torch.bfloat16, torch.float16):
        raise ValueError("too narrow")
    return layer.weight.abs()


def by_memory(layer, stats):
    return layer.weight.abs() if layer.weight.is_contiguous() else in_order(layer)


def too_few(layer, stats, pattern):
    """Prunes nothing where almost all is to go."""
    return Pruned(half(layer, pattern) | torch.tensor(pattern.sparsity > 0.9))


def ties_kept(layer, stats, pattern):
    return Pruned(half(layer, pattern) | torch.tensor(bool(layer.weight.std() == 0)))


BROKEN = {
    "masks are boolean and of the weight's shape": pruning(lambda la, stats, pattern: Pruned(half(la, pattern).byte())),
    "exactly as many weights are pruned as asked for": pruning(too_few),
    "ties change no count": pruning(ties_kept),
    "nothing pruned leaves the weights": pruning(
        lambda layer, stats, pattern: Pruned(half(layer, pattern), layer.weight * 1.1)
    ),
    "results are finite": scoring(lambda layer, stats: torch.where(layer.weight > 2, torch.inf, layer.weight.abs())),
    "what it measures is finite numbers": scoring(
        lambda layer, stats: layer.weight.abs(), measure=lambda self, layer, score, stats: {"mean": torch.nan}
    ),
    "dead inputs are no error": scoring(strict, requires=(ColumnSquares,)),
    "the same twice": scoring(by_calls),
    "the order in memory has no say": scoring(by_memory),
    "narrow dtypes work": scoring(float_only),
    "rows are pruned alike": scoring(
        lambda la, stats: la.weight.abs() * torch.arange(la.weight.shape[0])[:, None], scope="layer"
    ),
    "the split into batches has no say": scoring(by_first(40), requires=(First,)),
    "weights and statistics are not changed": scoring(spoils),
    "the statistics required are used": scoring(lambda layer, stats: layer.weight.abs(), requires=(Gram,)),
    "scores compare over several layers": scoring(one_layer_fails),
    "hashes have no say": scoring(by_hash),
    "whole models are pruned as asked for": pruning(never_two_of_four, scope="layer"),
    "every scope it allows works": NotByLayer(),
    "batches of a model have no say": scoring(by_first(20), requires=(First,)),
}

MODELS = {"whole models are pruned as asked for", "every scope it allows works", "batches of a model have no say"}
COMPARING = {"the order in memory has no say", "the split into batches has no say", "rows are pruned alike"}
BESIDES = {
    # The engine refuses these.
    "masks are boolean and of the weight's shape": MODELS,
    "weights and statistics are not changed": MODELS,
    "what it measures is finite numbers": MODELS,
    # Nothing compares with what differs each time.
    "the same twice": COMPARING | MODELS | {"scores compare over several layers", "hashes have no say"},
    "the split into batches has no say": {"batches of a model have no say"},
}
"""What else a broken metric may fail, by what it breaks."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_metric_is_caught_by_the_check_of_what_it_breaks(name):
    failed = {check.name: said for check, said in run_checks([BROKEN[name]]) if said is not None}
    assert name in failed, failed
    assert set(failed) <= {name} | BESIDES.get(name, set()), failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_metric_that_is_another_on_cuda_is_caught():
    failed = [check.name for check, said in run_checks([scoring(on_the_cpu_alone)]) if said is not None]
    assert failed == ["cuda gives the masks of the cpu"]


def test_a_good_metric_passes_everything():
    assert [said for _, said in run_checks([Good()]) if said is not None] == []
    assert {check.name for check in checks_for(Good())} == {*BROKEN, "cuda gives the masks of the cpu"}


def test_a_check_that_cannot_be_run_here_says_why():
    skipped = {check.name: check.skip for check in checks_for(Good()) if check.skip is not None}
    reason = {"cuda gives the masks of the cpu": "torch sees no CUDA device"}
    assert skipped == ({} if torch.cuda.is_available() else reason)


class Loses(Refiner):
    def refine(self, layer, stats, pruned, pattern):
        return Pruned(torch.zeros_like(pruned.mask))


class Spoils(Refiner):
    def refine(self, layer, stats, pruned, pattern):
        pruned.mask[0, 0] ^= True
        pruned.mask[0, 0] ^= True
        layer.weight.mul_(2)
        return pruned


class Forgets(Allocator):
    def allocate(self, measures, sizes, sparsity):
        return {name: sparsity for layers in list(sizes.values())[1:] for name in layers}


class Tuples(Allocator):
    def measure(self, block, stats, score):
        return {"pair": (1, 2)}

    def allocate(self, measures, sizes, sparsity):
        share = 0.1 if all(isinstance(each["pair"], tuple) for each in measures.values()) else 0.9
        return {name: share for layers in sizes.values() for name in layers}


class Draws(Allocator):
    def allocate(self, measures, sizes, sparsity):
        return {name: random.random() for layers in sizes.values() for name in layers}


@pytest.mark.parametrize(
    ("plugin", "name"),
    [
        (Loses(), "refined masks fit the pattern"),
        (Spoils(), "nothing given is changed"),
        (Forgets(), "every layer has a sparsity"),
        (Tuples(), "measures are what json holds"),
        (Draws(), "the same twice"),
    ],
)
def test_a_broken_refiner_or_allocator_is_caught(plugin, name):
    assert name in {check.name for check, said in run_checks([plugin]) if said is not None}


def test_expected_failures_need_a_check_and_a_plugin_a_kind():
    with pytest.raises(PruneForgeError, match="'good' has no check 'rows are square'"):
        parametrize_with_checks([Good()], {"good": {"rows are square": "no reason"}})
    with pytest.raises(PruneForgeError, match=r"not one of metric, .*, statistic class"):
        checks_for(object())
    with pytest.raises(PruneForgeError, match="no checks of the class Good"):
        checks_for(Good)
