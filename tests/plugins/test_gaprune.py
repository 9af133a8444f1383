"""GAPrune: its formula, what it says of itself, and whole runs with two sets of data and a contrastive loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import commands
import pytest
import torch
import transformers
from test_bert import SIZES, SMALL

import pruneforge
from pruneforge import GradientSquares, GradientSum, Layer, LayerStatistics, On, PruneForgeError
from pruneforge.interfaces.patterns import pruned_count
from pruneforge.plugins import loaded_plugins
from pruneforge_gaprune.metric import GAPrune, ranks_of

KILLER = Path(__file__).parents[1] / "engine" / "killer.py"


def gaprune(**options):
    return loaded_plugins().registry.create("metric", "gaprune", options)


def made(shape=(6, 9), scale=1.0, seed=0, dtype=torch.float64):
    """A layer, and gradients [samples, out, in] on two sets of data."""
    generator = torch.Generator().manual_seed(seed)
    weight, *gradients = (torch.randn(*size, *shape, generator=generator).to(dtype) for size in ((), (5,), (7,)))
    return Layer("layer", torch.nn.Parameter(weight, False)), [scale * each for each in gradients]


def statistics(layer, gradients):
    found = {}
    for stream, of_samples in zip((None, "general"), gradients, strict=True):
        for kind in (GradientSquares, GradientSum):
            statistic = kind(
                layer.shape, torch.promote_types(layer.parameter.dtype, torch.float32), torch.device("cpu")
            )
            for gradient in of_samples:
                statistic.add(gradient.to(statistic.total.dtype))
            statistic.samples = len(of_samples)
            found[On(stream, kind) if stream else kind] = statistic
    return LayerStatistics(found, {})


def by_loops(weight, domain, general, alpha, beta, gamma):
    """The paper's score, entry by entry."""
    rows, columns = weight.shape
    dot = norm_domain = norm_general = 0.0
    for i in range(rows):
        for j in range(columns):
            one = sum(float(g[i, j]) for g in domain) / len(domain)
            two = sum(float(g[i, j]) for g in general) / len(general)
            dot, norm_domain, norm_general = dot + one * two, norm_domain + one**2, norm_general + two**2
    alignment = dot / math.sqrt(norm_domain * norm_general)
    score = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            in_domain = sum(float(g[i, j]) ** 2 for g in domain) / len(domain)
            elsewhere = sum(float(g[i, j]) ** 2 for g in general) / len(general)
            size = abs(float(weight[i, j]))
            score[i, j] = ((in_domain - beta * elsewhere) * size + gamma * math.sqrt(size)) * (1 + alpha * alignment)
    return score


@pytest.mark.parametrize("options", [{}, {"alpha": 0.7, "beta": 0.3, "gamma": 0.1}])
def test_the_score_is_the_papers(options):
    layer, gradients = made()
    expected = by_loops(layer.weight, *gradients, **{"alpha": 0.2, "beta": 1.0, "gamma": 0.5, **options})
    torch.testing.assert_close(gaprune(**options).score(layer, statistics(layer, gradients)), expected)


def test_the_control_is_the_domains_fisher_and_needs_nothing_else():
    layer, (domain, general) = made()
    metric, stats = gaprune(score="fisher"), statistics(layer, (domain, general))
    assert metric.requires == (GradientSquares,)
    torch.testing.assert_close(metric.score(layer, stats), domain.square().mean(0) * layer.weight.square())
    order, other = (each.flatten().argsort() for each in (metric.score(layer, stats), gaprune().score(layer, stats)))
    assert not torch.equal(order, other)


def test_small_gradients_still_order_weights_of_equal_size():
    """What float16 sums, or a float32 score, would lose beside the root of |w|."""
    layer, gradients = made(scale=1e-6, dtype=torch.float32)
    layer = Layer("layer", torch.nn.Parameter(torch.ones(6, 9), False))
    score = gaprune().score(layer, statistics(layer, gradients))
    assert score.float().unique().numel() == 1
    difference = gradients[0].double().square().mean(0) - gradients[1].double().square().mean(0)
    assert torch.equal(score.flatten().argsort(), difference.flatten().argsort())


def test_no_gradient_at_all_leaves_the_root_of_the_weight():
    layer, (domain, _) = made()
    score = gaprune().score(layer, statistics(layer, (domain * 0, domain * 0)))
    torch.testing.assert_close(score, 0.5 * layer.weight.abs().sqrt())


def test_ranks_of_equal_values_are_their_mean():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0, 1.0])
    expected = [sum(1 for v in values if v < x) + (sum(1 for v in values if v == x) + 1) / 2 for x in values]
    assert ranks_of(values).tolist() == expected


def test_spearman_is_one_of_magnitude_and_follows_the_classical_formula():
    layer, gradients = made()
    metric, stats = gaprune(), statistics(layer, gradients)
    score = metric.score(layer, stats)
    ranks = [each.flatten().argsort().argsort().double() for each in (score, layer.weight.abs())]
    n = score.numel()
    expected = 1 - 6 * float((ranks[0] - ranks[1]).square().sum()) / (n * (n**2 - 1))
    assert metric.measure(layer, score, stats)["spearman"] == pytest.approx(expected)
    assert metric.measure(layer, layer.weight.abs().sqrt(), stats)["spearman"] == pytest.approx(1)
    assert metric.measure(layer, torch.ones(6, 9), stats) == {}


def test_spearman_of_a_large_layer_is_that_of_a_fixed_sample():
    layer, gradients = made((400, 300))
    metric, stats = gaprune(), statistics(layer, gradients)
    score = metric.score(layer, stats)
    first, again = (metric.measure(layer, score, stats)["spearman"] for _ in range(2))
    whole = torch.corrcoef(torch.stack([ranks_of(score.flatten()), ranks_of(layer.weight.abs().flatten())]))[0, 1]
    assert first == again == pytest.approx(float(whole), abs=0.01)


def test_a_score_that_orders_as_magnitude_does_is_warned_of():
    line, *none = gaprune().remarks({"a": {"spearman": 0.5}, "b": {"spearman": 0.9989}})
    assert "0.5000 to 0.9989 over 2 layers" in line
    assert none == []
    _, warning = gaprune().remarks({"a": {"spearman": 0.5}, "b": {"spearman": 0.9995}})
    assert "1 of 2 layers as magnitude does (Spearman above 0.999), such as b" in warning


def encoder():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**{**SMALL, "vocab_size": 384}, **SIZES)).eval()


def texts(seed, samples=8):
    """Batches of two pairs each, padded on the right."""
    ids = torch.randint(3, 96, (samples, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1::3, 7:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


def pruned(model, metric="gaprune", sparsity=0.5, **settings):
    given = {"objective": "contrastive", "streams": {"general": texts(2)}, "propagate": "dense", **settings}
    return pruneforge.prune(model, metric, sparsity, None, texts(1), **given)


@pytest.mark.parametrize("scope", [None, "row"])
def test_an_encoder_is_pruned_exactly_and_the_report_has_the_rank_correlation(scope, tmp_path):
    encoder().save_pretrained(tmp_path / "model")
    options = {"options": {"scope": scope}} if scope else {}
    whole = pruned(encoder(), **options)
    streamed = pruned(tmp_path / "model", output=tmp_path / "out", **options)
    assert whole.report["pattern"]["scope"] == (scope or "model")
    counts = [int((~mask).sum()) for mask in whole.masks.values()]
    sizes = [mask.numel() for mask in whole.masks.values()]
    assert sum(counts) == pruned_count(sum(sizes), 0.5)
    shares = {count / size for count, size in zip(counts, sizes, strict=True)}
    assert (shares == {0.5}) == (scope == "row")
    assert all(torch.equal(streamed.masks[name], mask) for name, mask in whole.masks.items())
    for report in (whole.report, streamed.report):
        correlations = [layer["measured"]["spearman"] for layer in report["layers"].values()]
        assert len(correlations) == len(counts)
        assert all(-1 <= each <= 1 for each in correlations)
        assert any("Spearman rank correlation of the score with |w|" in line for line in report["warnings"])
    assert json.loads((tmp_path / "out" / "pruneforge.json").read_text())["layers"] == streamed.report["layers"]


def command(folder, output, *more):
    """The arguments of a streamed run on pairs from two files."""
    if not (folder / "model").exists():
        encoder().double().save_pretrained(folder / "model")
        transformers.ByT5Tokenizer(extra_ids=0, additional_special_tokens=[]).save_pretrained(folder / "model")
        for name in ("domain", "general"):
            rows = [{"query": "?" * (n % 5 + 1), "positive": f"!{n} {name}"} for n in range(16)]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = (
        "--calibration",
        f"pairs:{folder / 'domain.jsonl'}",
        "--stream",
        f"general=pairs:{folder / 'general.jsonl'}",
    )
    asked = ("--metric", "gaprune", "--sparsity", 0.5, "--propagate", "dense", "--objective", "contrastive")
    size = ("--samples", 16, "--seqlen", 12, "--batch-size", 4)
    return ("prune", folder / "model", *asked, *data, *size, "--output", folder / output, *more)


def test_two_processes_and_a_resumed_run_report_what_one_run_does(tmp_path):
    one = commands.run(*command(tmp_path, "one"))
    assert one.returncode == 0, one.stderr
    assert "Spearman rank correlation of the score with |w|" in " ".join(one.stderr.split())
    for done in commands.run_together(2, *command(tmp_path, "two")):
        assert done.returncode == 0, done.stderr
    killed = commands.run(*command(tmp_path, "three", "-p", KILLER), KILL_AT="-2")
    assert killed.returncode != 0
    assert (tmp_path / "three").exists()
    resumed = commands.run(*command(tmp_path, "three", "-p", KILLER, "--resume"), KILL_AT="0")
    assert resumed.returncode == 0, resumed.stderr
    first, second, third = (json.loads((tmp_path / n / "pruneforge.json").read_text()) for n in ("one", "two", "three"))
    assert third["layers"] == first["layers"]
    assert third["warnings"] == first["warnings"]
    for name, layer in first["layers"].items():
        assert second["layers"][name]["measured"]["spearman"] == pytest.approx(layer["measured"]["spearman"])


def test_magnitude_in_all_but_name_is_warned_of_in_the_report():
    report = pruned(encoder(), options={"gamma": 1e6}).report
    assert any("12 of 12 layers as magnitude does" in line for line in report["warnings"])
    alone = pruned(encoder(), options={"score": "fisher"}, streams=None).report
    assert not any("as magnitude does" in line for line in alone["warnings"])
    assert pruned(encoder()).masks.keys() == alone["layers"].keys()


def test_the_control_prunes_other_weights():
    one, two = pruned(encoder()), pruned(encoder(), options={"score": "fisher"}, streams=None)
    assert any(not torch.equal(one.masks[name], two.masks[name]) for name in one.masks)
    with pytest.raises(PruneForgeError, match="requires calibration data 'general'"):
        pruned(encoder(), streams=None)


class Measuring(GAPrune):
    """Measures what is no number."""

    def measure(self, layer, score, stats):
        return {"spearman": math.nan}


def test_what_a_metric_measures_must_be_finite_numbers():
    with pytest.raises(PruneForgeError, match=r"metric 'measuring' measured of layer .* what is not finite numbers"):
        pruned(encoder(), Measuring())
