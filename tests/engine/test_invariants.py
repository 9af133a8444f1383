"""What must not change a mask, and what must."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pruneforge
from pruneforge import ColumnSquares, Gram, Layer, LayerStatistics
from pruneforge.engine import backward, budget
from pruneforge.engine.budget import Budgets
from pruneforge.interfaces.patterns import NM, Unstructured, pruned_count
from pruneforge.numerics import exact_arithmetic
from pruneforge.plugins import loaded_plugins

CALIBRATED = ["wanda", "sparsegpt", "gblm"]
METRICS = ["magnitude", *CALIBRATED]


def masks(metric, batches, model=None, sparsity=0.5, pattern=None, **options):
    model = tiny_llama() if model is None else copy.deepcopy(model)
    return pruneforge.prune(model, metric, sparsity, pattern, batches, **options).masks


def assert_same(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("metric", CALIBRATED)
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), order=st.permutations(range(6)))
def test_batch_sizes_and_sample_order_change_nothing(metric, sizes, order):
    ids = tokens()
    batches, rest = [], ids[list(order)]
    for size in sizes:
        batches.append(rest[:size])
        rest = rest[size:]
    batches = [batch for batch in [*batches, rest] if len(batch)]
    assert_same(masks(metric, [ids]), masks(metric, batches))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("metric", CALIBRATED)
def test_padding_is_ignored(metric, side):
    ids = tokens()
    pad = torch.full((6, 5), 7)
    parts, ones = ([pad, ids], [pad * 0, ids * 0 + 1]) if side == "left" else ([ids, pad], [ids * 0 + 1, pad * 0])
    padded = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(ones, 1)}
    assert_same(masks(metric, [ids]), masks(metric, [padded]))


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_gblm_with_alpha_zero_is_wanda(pattern):
    batches = tokens().split(2)
    assert_same(masks("gblm", batches, pattern=pattern, options={"alpha": 0}), masks("wanda", batches, pattern=pattern))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_made_a_few_rows_at_a_time_add_up_alike(norm, monkeypatch):
    expected = masks("gblm", tokens().split(2), options={"norm": norm})
    monkeypatch.setattr(backward, "CACHED_ON_CPU", 1000)  # 15 or 6 rows of tiny layers
    assert_same(masks("gblm", tokens().split(2), options={"norm": norm}), expected)


@pytest.mark.parametrize("side", [None, "left"])
def test_a_batch_that_passes_the_head_a_few_samples_at_a_time_gives_the_same_gradients(side, monkeypatch):
    ids, pad = tokens(), torch.full((6, 5), 7)
    batch = {"input_ids": ids}
    if side:
        mask = torch.cat([pad * 0, ids * 0 + 1], 1)
        batch = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": mask}
    expected = masks("gblm", [batch])
    monkeypatch.setattr(budget, "HEAD_LOGITS", 4 * 29 * 96)  # four samples, then two
    assert_same(masks("gblm", [batch]), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_seed_gives_the_same_bytes(metric, checkpoint, two_threads):
    def run(seed):
        return pruneforge.prune(checkpoint, metric, 0.5, None, "python-docs", samples=4, seqlen=64, seed=seed)

    first, second = run(0), run(0)
    assert_same(first.masks, second.masks)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    if metric != "magnitude":
        assert any(not torch.equal(first.masks[n], m) for n, m in run(1).masks.items())


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = tiny_llama(seed=3)
    torch.manual_seed(3)
    pruneforge.prune(model, "wanda", 0.5, None, [tokens()])
    assert torch.equal(torch.rand(4), expected)


def linear(out_features: int, in_features: int, weight: torch.Tensor | None = None) -> Layer:
    module = torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.float64)
    if weight is not None:
        module.weight.data = weight
    return Layer("layer", module.weight)


def statistics(inputs: torch.Tensor, kinds, samples: int = 1) -> LayerStatistics:
    made = {}
    for kind in kinds:
        made[kind] = kind((1, inputs.shape[1]), inputs.dtype, inputs.device)
        made[kind].update(inputs, samples)
    return LayerStatistics(made, {})


def metric_of(name, **options):
    from pruneforge.plugins import loaded_plugins

    return loaded_plugins().registry.create("metric", name, options)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)])
@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_sparsegpt_on_a_diagonal_gram_picks_what_wandas_square_picks(pattern, seed):
    torch.manual_seed(seed)
    norms = torch.rand(16, dtype=torch.float64) + 0.5
    layer = linear(5, 16, torch.randn(5, 16, dtype=torch.float64))
    stats = statistics(torch.diag(norms), (Gram, ColumnSquares))
    # Damping adds a constant to every column's square, so it is made too small to matter.
    sparse = metric_of("sparsegpt", damping=1e-12).prune_layer(layer, stats, pattern)
    wanda = metric_of("wanda").prune_layer(layer, stats, pattern)
    assert torch.equal(sparse.mask, wanda.mask)
    assert torch.equal(sparse.weight, torch.where(sparse.mask, layer.weight, 0))


@given(exponent=st.integers(-20, 20), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_sparsegpt_does_not_depend_on_the_grams_scale(exponent, seed):
    torch.manual_seed(seed)
    layer = linear(6, 24, torch.randn(6, 24, dtype=torch.float64))
    inputs = torch.randn(40, 24, dtype=torch.float64)
    metric = metric_of("sparsegpt", block_size=8)
    first = metric.prune_layer(layer, statistics(inputs, (Gram,)), Unstructured(0.5))
    second = metric.prune_layer(layer, statistics(inputs * 2.0**exponent, (Gram,)), Unstructured(0.5))
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_a_dead_column_is_pruned_first_and_poisons_nothing(pattern):
    torch.manual_seed(0)
    inputs = torch.randn(50, 16, dtype=torch.float64)
    inputs[:, 5] = 0
    weight = torch.randn(8, 16, dtype=torch.float64)
    weight[:, 5] = 100.0
    layer = linear(8, 16, weight)
    for name in ("wanda", "sparsegpt"):
        pruned = metric_of(name).prune_layer(layer, statistics(inputs, (Gram, ColumnSquares)), pattern)
        assert not pruned.mask[:, 5].any()
        if pruned.weight is not None:
            assert torch.isfinite(pruned.weight).all()
            assert (pruned.weight[:, 5] == 0).all()


def test_sparsegpt_leaves_a_smaller_error_than_masking_alone():
    torch.manual_seed(0)
    inputs = torch.randn(200, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64)
    layer = linear(16, 32, torch.randn(16, 32, dtype=torch.float64))
    stats = statistics(inputs, (Gram, ColumnSquares))
    pruned = metric_of("sparsegpt").prune_layer(layer, stats, Unstructured(0.5))
    dense = inputs @ layer.weight.T

    def error(weight):
        return (inputs @ weight.T - dense).square().sum()

    wanda = metric_of("wanda").prune_layer(layer, stats, Unstructured(0.5))
    assert error(pruned.weight) < error(layer.weight * pruned.mask)
    assert error(pruned.weight) < error(layer.weight * wanda.mask)


def test_a_failed_factorisation_raises_the_damping_and_says_so():
    torch.manual_seed(0)
    # Two equal columns: singular without damping, and far below what float64 resolves with 1e-30.
    inputs = torch.randn(40, 7, dtype=torch.float64)
    inputs = torch.cat([inputs, inputs[:, :1]], dim=1)
    pruned = metric_of("sparsegpt", damping=1e-30).prune_layer(
        linear(4, 8), statistics(inputs, (Gram,)), Unstructured(0.5)
    )
    assert len(pruned.notes) == 1
    assert "damping raised to" in pruned.notes[0]


@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 0.001, 0.29, 0.999])
@pytest.mark.parametrize("metric", METRICS)
def test_counts_are_exact_in_every_layer(metric, sparsity):
    model = tiny_llama(torch.bfloat16)  # coarse weights: ties everywhere
    result = pruneforge.prune(model, metric, sparsity, None, [tokens()])
    for name, mask in result.masks.items():
        out_features, in_features = mask.shape
        if metric == "magnitude":
            expected = pruned_count(mask.numel(), sparsity)
        elif metric == "sparsegpt":
            starts = range(0, in_features, 128)
            expected = sum(pruned_count(out_features * min(128, in_features - s), sparsity) for s in starts)
        else:
            expected = out_features * pruned_count(in_features, sparsity)
        assert (~mask).sum().item() == expected
        weight = result.model.get_submodule(name).weight
        assert (weight[~mask] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_layers_weights_change(metric):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = pruneforge.prune(model, metric, 0.5, None, [tokens()])
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer not in result.masks:
            assert torch.equal(value, before[name]), name
        elif metric != "sparsegpt":
            assert torch.equal(value, before[name] * result.masks[layer]), name


def scores_of(metric, model, batches):
    """Dense-model scores, collected by a plugin that only looks."""
    from pruneforge.plugins import loaded_plugins

    chosen = loaded_plugins().registry.create("metric", metric, {})
    seen = {}
    original = chosen.score

    def score(layer, stats):
        seen[layer.name] = original(layer, stats)
        return seen[layer.name]

    chosen.score = score
    pruneforge.prune(copy.deepcopy(model), chosen, 0.0, None, batches, propagate="dense")
    return seen


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "gblm"])
@pytest.mark.parametrize("scope", ["row", "layer", "block", "model"])
def test_scopes_compare_what_they_say(metric, scope):
    model, batches = tiny_llama(), tokens().split(3)
    scores = scores_of(metric, model, batches)
    found = masks(metric, batches, model=model, sparsity=0.4, options={"scope": scope}, propagate="dense")
    groups: dict = {}
    for name, score in scores.items():
        key = {"row": name, "layer": name, "block": name.split(".")[2], "model": ""}[scope]
        rows = list(zip(score, found[name], strict=True)) if scope == "row" else [(score, found[name])]
        for index, (values, mask) in enumerate(rows):
            group = groups.setdefault((key, index if scope == "row" else 0), ([], []))
            group[0].append(values.flatten())
            group[1].append(mask.flatten())
    for values, mask in groups.values():
        flat, keep = torch.cat(values), torch.cat(mask)
        order = torch.sort(flat, stable=True).indices[: pruned_count(len(flat), 0.4)]
        expected = torch.ones_like(keep).scatter(0, order, False)
        assert torch.equal(keep, expected)


def test_excluded_layers_stay_dense_and_are_counted():
    model = tiny_llama()
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    exclude = ["*.down_proj", "model.layers.0.self_attn.*"]
    result = pruneforge.prune(model, "wanda", 0.5, None, [tokens()], exclude=exclude)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)
    left_out = [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    left_out += [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert sorted(result.report["excluded"]) == sorted(left_out)
    assert not set(result.masks) & set(left_out)
    # Two square projections and two half as wide a block, three of the MLP.
    attention, mlp = 64 * 64 * 3, 64 * 160
    assert result.report["sparsity"]["weights"] == 3 * (attention + 3 * mlp)
    assert result.report["sparsity"]["pruned"] == (2 * attention + 3 * 2 * mlp) // 2


def test_one_input_has_one_statistic():
    from pruneforge.plugins import loaded_plugins

    chosen = loaded_plugins().registry.create("metric", "wanda", {})
    seen = {}
    chosen.score = lambda layer, stats: (
        seen.__setitem__(layer.name.rpartition(".")[2], stats[ColumnSquares]) or layer.weight.abs()
    )
    pruneforge.prune(tiny_llama(num_hidden_layers=1), chosen, 0.5, None, [tokens()])
    assert seen["q_proj"] is seen["k_proj"] is seen["v_proj"]
    assert seen["gate_proj"] is seen["up_proj"]
    assert len({id(statistic) for statistic in seen.values()}) == 4


def test_statistics_merge_by_addition_and_restore():
    torch.manual_seed(0)
    inputs = torch.randn(30, 8, dtype=torch.float64)
    for kind in (ColumnSquares, Gram):
        whole = statistics(inputs, (kind,), 3)[kind]
        first, second = statistics(inputs[:10], (kind,), 1)[kind], statistics(inputs[10:], (kind,), 2)[kind]
        first.merge(second)
        torch.testing.assert_close(first.total, whole.total)
        assert (first.samples, first.tokens) == (whole.samples, whole.tokens) == (3, 30)
        fresh = kind((1, 8), inputs.dtype, inputs.device)
        fresh.load_state_dict(first.state_dict())
        assert torch.equal(fresh.total, first.total)
        assert fresh.samples == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [24, 300, 1030])
def test_sums_over_narrow_inputs_are_as_exact_as_float32(dtype, columns):
    torch.manual_seed(0)
    inputs = torch.randn(3, 700, columns).mul(torch.logspace(-3, 1, columns)).to(dtype)
    precision = torch.get_float32_matmul_precision()
    with exact_arithmetic(0, torch.device("cpu")):
        found = {kind: kind((1, columns), torch.float32, inputs.device) for kind in (Gram, ColumnSquares)}
        for number, batch in enumerate(inputs):
            for statistic in found.values():
                statistic.update(batch, 1)
            if number == 0:
                assert found[Gram].total.shape == (columns, columns)  # asked for in between, it is whole then and later
    exact = inputs.reshape(-1, columns).double()
    gram, scale = exact.T @ exact, exact.square().sum(0).sqrt()
    assert ((found[Gram].total - gram).abs() <= 1e-5 * scale[:, None] * scale).all()
    assert torch.equal(found[Gram].total, found[Gram].total.T)
    torch.testing.assert_close(found[ColumnSquares].total.double(), scale**2, rtol=1e-5, atol=0)
    assert torch.get_float32_matmul_precision() == precision


def test_a_small_budget_makes_smaller_batches():
    model = tiny_llama(torch.float32)
    blocks = loaded_plugins().registry.create("adapter", "llama").blocks(model)
    # Inputs and outputs of q, k, v, o, gate, up and down, four bytes each.
    token = 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 160) * 3)
    device = torch.device("cpu")
    assert Budgets().tokens_a_batch(blocks, device) == 1024
    assert Budgets(host=8 * 100 * token).tokens_a_batch(blocks, device) == 100
    assert Budgets(host=1).tokens_a_batch(blocks, device) == 1
    assert Budgets(device=1).tokens_a_batch(blocks, device) == 1024


def test_observers_see_the_run_and_cannot_change_it():
    from pruneforge.interfaces.hookspecs import hookimpl
    from pruneforge.plugins import loaded_plugins

    class Observer:
        def __init__(self):
            self.events = []

        @hookimpl
        def pruneforge_run_started(self, run):
            self.events.append(("started", len(run.blocks)))

        @hookimpl
        def pruneforge_block_pruned(self, run, result):
            self.events.append((result.index, sorted(result.masks)[0]))

        @hookimpl
        def pruneforge_run_finished(self, report):
            self.events.append(("finished", report["sparsity"]["reached"]))

    observer = Observer()
    loaded_plugins().register(observer)
    try:
        pruneforge.prune(tiny_llama(), "magnitude", 0.5)
    finally:
        loaded_plugins().unregister(observer)
    assert observer.events[0] == ("started", 3)
    assert [event[0] for event in observer.events[1:-1]] == [0, 1, 2]
    assert observer.events[-1] == ("finished", 0.5)
