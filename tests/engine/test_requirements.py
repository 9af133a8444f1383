"""What a method may require beyond sums over inputs: outputs, moments, gradients of a block's output, named data."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import pytest
import reference
import torch
from conftest import outcome, tiny_llama, tokens
from torch.nn import functional as F

import pruneforge
from pruneforge import (
    Allocator,
    BlockGradientStatistic,
    ColumnMoments,
    ColumnSquares,
    ColumnSums,
    GradientSquares,
    GradientSum,
    InputStatistic,
    Metric,
    Objective,
    On,
    OutputSquares,
    Pruned,
    PruneForgeError,
)
from pruneforge.interfaces.patterns import pruned_count


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_llama(torch.float64).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def batches():
    return tokens().split(3)


def padded():
    """The last two samples end early."""
    valid = torch.ones(6, 24, dtype=torch.long)
    valid[4:, 17:] = 0
    return [{"input_ids": tokens()[rows], "attention_mask": valid[rows]} for rows in (slice(0, 4), slice(4, 6))]


def samples(data):
    return [
        {"input_ids": ids[None], "attention_mask": valid[None]}
        for each in data
        for ids, valid in zip(each["input_ids"], each["attention_mask"], strict=True)
    ]


class Keeping(Metric):
    """Scores by the weight, and keeps copies of the statistics it was given."""

    requires = ()

    def __init__(self, *requires):
        super().__init__()
        self.requires, self.seen = requires, {}

    def score(self, layer, stats):
        self.seen[layer.name] = {each: (stats[each].total.clone(), stats[each].samples) for each in self.requires}
        return layer.weight.abs()


def seen(*requires, data=None, **settings):
    metric = Keeping(*requires)
    settings = {"propagate": "dense", **settings}
    pruneforge.prune(tiny_llama(), metric, 0.5, None, data or padded(), **settings)
    return metric.seen


def test_sums_and_moments_are_those_of_all_valid_tokens_at_once():
    dense, kind = tiny_llama(), reference.LanguageModel
    found = seen(ColumnSums, ColumnMoments)
    for name, block in kind.blocks(dense):
        layers = reference.linears(name, block)
        inputs = reference.layer_inputs(kind, dense, layers, samples(padded()))
        for layer, _ in layers:
            every = torch.cat(inputs[layer])
            assert len(every) == 6 * 24 - 2 * 7
            torch.testing.assert_close(found[layer][ColumnSums][0], every.sum(0))
            mean, centred = found[layer][ColumnMoments][0]
            torch.testing.assert_close(mean, every.mean(0))
            torch.testing.assert_close(centred / len(every), every.var(0, correction=0))


def test_moments_keep_a_small_variance_beside_a_large_mean():
    values = 1000 + 0.01 * torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    parts = [ColumnMoments((1, 4), torch.float32, torch.device("cpu")) for _ in range(2)]
    for part, half in zip(parts, values.split(2500), strict=True):
        for some in half.split(500):
            part.update(some, 1)
    parts[0].merge(parts[1])
    torch.testing.assert_close(parts[0].variance().double(), values.double().var(0, correction=0), rtol=0.02, atol=0)
    assert (parts[0].samples, parts[0].tokens) == (10, 5000)


def test_output_squares_are_those_of_what_each_layer_puts_out():
    dense = tiny_llama(attention_bias=True)
    torch.manual_seed(5)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    metric, outputs = Keeping(OutputSquares, ColumnSquares), {}
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, []).append(output))
    with torch.no_grad():
        for sample in samples(padded()):
            dense(input_ids=sample["input_ids"][:, : int(sample["attention_mask"].sum())])
    expected = {name: torch.cat([each[0] for each in values]).square().sum(0) for name, values in outputs.items()}
    pruneforge.prune(dense, metric, 0.5, None, padded(), propagate="dense")
    for layer, of_layer in metric.seen.items():
        torch.testing.assert_close(of_layer[OutputSquares][0], expected[layer])
        assert of_layer[OutputSquares][1] == 6


class Regional(BlockGradientStatistic, GradientSquares):
    @staticmethod
    def loss(output, batch, target):
        assert target is None
        valid = torch.ones(output.shape[:2]) if batch.valid is None else batch.valid
        return (output * valid[:, :, None]).flatten(1).norm(dim=1)


class Distance(BlockGradientStatistic, GradientSum):
    with_target = True

    @staticmethod
    def loss(output, batch, target):
        return (output - target).square().flatten(1).sum(1)


def test_gradients_of_a_blocks_output_are_each_samples_own():
    dense, found = tiny_llama(), seen(Regional)
    for index, block in enumerate(dense.model.layers):
        kept = []
        handle = block.register_forward_hook(lambda _, __, output: kept.append(output))  # noqa: B023
        layers = reference.linears(f"model.layers.{index}", block)
        expected = {name: torch.zeros_like(module.weight) for name, module in layers}
        for sample in samples(padded()):
            length = int(sample["attention_mask"].sum())
            dense(input_ids=sample["input_ids"][:, :length])
            grads = torch.autograd.grad(kept.pop().norm(), [module.weight for _, module in layers])
            for (name, _), gradient in zip(layers, grads, strict=True):
                expected[name] += gradient.square()
        handle.remove()
        for name, total in expected.items():
            torch.testing.assert_close(found[name][Regional][0], total)


def test_a_blocks_output_can_be_compared_with_the_dense_models():
    ids = tokens()
    metric, pruned, dense = Keeping(Distance), tiny_llama(), tiny_llama()
    pruneforge.prune(pruned, metric, 0.5, None, [ids])
    hidden = true = dense.model.embed_tokens(ids).detach()
    rope = dense.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for index, block in enumerate(dense.model.layers):
        layers = reference.linears(f"model.layers.{index}", block)
        with torch.no_grad():
            target = block(true, position_embeddings=rope)
        loss = (block(hidden, position_embeddings=rope) - target).square().sum()
        grads = torch.autograd.grad(loss, [module.weight for _, module in layers])
        for (name, _), gradient in zip(layers, grads, strict=True):
            torch.testing.assert_close(metric.seen[name][Distance][0], gradient, atol=1e-9, rtol=1e-6)
            assert (index == 0) == (gradient.abs().max() < 1e-9)
        with torch.no_grad():
            hidden, true = pruned.model.layers[index](hidden, position_embeddings=rope), target


def test_gradients_of_a_blocks_output_are_streamed_and_resumed_alike(model, tmp_path):
    expected = pruneforge.prune(model, "wanda++", 0.5, None, batches())
    found = pruneforge.prune(model, "wanda++", 0.5, None, batches(), output=tmp_path / "out")
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert found.report["measured"]["gradient_cache"] == {"reused": 0, "added_bytes": 0}  # they depend on the run


def test_two_processes_merge_every_kind_of_statistic(checkpoint, tmp_path):
    (tmp_path / "all.py").write_text(EVERYTHING)
    asked = ("prune", checkpoint, "--metric", "everything", "-p", tmp_path / "all.py", "--calibration", "python-docs")
    asked += ("--samples", 4, "--seqlen", 64, "--batch-size", 1, "--dtype", "float64", "--stream", "more=python-docs")
    one = commands.run(*asked, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    for done in commands.run_together(2, *asked, "--output", tmp_path / "two"):
        assert done.returncode == 0, done.stderr
    first, second = (pruneforge.load(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(second.masks[name], mask) for name, mask in first.masks.items())
    described = first.report["calibration"]
    assert described["streams"]["more"]["fingerprint"] != described["fingerprint"]  # a draw of its own


EVERYTHING = """
from pruneforge import *
from pruneforge.interfaces.hookspecs import hookimpl

class Regional(BlockGradientStatistic, GradientMagnitude):
    @staticmethod
    def loss(output, batch, target):
        return output.square().flatten(1).sum(1)

class Everything(Metric):
    named = (On("more", ColumnSquares), On("more", GradientSquares))
    requires = (ColumnSums, ColumnMoments, OutputSquares, Regional, *named)
    def score(self, layer, stats):
        of_outputs = stats[OutputSquares].per_sample()[:, None] * stats[Regional].total
        more = stats[On("more", ColumnSquares)].per_sample() * stats[On("more", GradientSquares)].total.sqrt()
        own = stats[ColumnMoments].variance() + stats[ColumnSums].per_token().abs()
        return layer.weight.abs() * (own + of_outputs + more)

@hookimpl
def pruneforge_register(registry):
    registry.metric("everything", Everything)
"""


def test_each_stream_gives_what_its_data_give_alone(model, tmp_path, gradient_cache):
    other = tokens(seed=9)
    named = (On("other", ColumnSquares), On("other", GradientSquares))
    found = seen(ColumnSquares, GradientSum, *named, data=batches(), streams={"other": other.split(2)})
    main, alone = (
        seen(ColumnSquares, GradientSum, data=batches()),
        seen(ColumnSquares, GradientSquares, data=other.split(2)),
    )
    for layer, of_layer in found.items():
        for kind in (ColumnSquares, GradientSum):
            torch.testing.assert_close(of_layer[kind], main[layer][kind])
        for each in named:
            torch.testing.assert_close(of_layer[each], alone[layer][each.kind])
    # Streamed, each stream has gradients of its own in the cache.
    asked = (model, Keeping(GradientSum, On("other", GradientSum)), 0.5, None, batches())
    whole = pruneforge.prune(*asked, streams={"other": other.split(2)}, output=tmp_path / "out")
    assert len(list(gradient_cache.glob("*/identity.json"))) == 2
    again = pruneforge.prune(*asked, streams={"other": other.split(2)}, output=tmp_path / "again")
    assert again.report["measured"]["gradient_cache"]["reused"] == 2 * len(found)
    assert outcome(whole.folder) == outcome(again.folder)
    third = pruneforge.prune(*asked, streams={"other": tokens(seed=10).split(2)}, output=tmp_path / "third")
    assert third.report["identity"]["calibration data"] != again.report["identity"]["calibration data"]


@pytest.mark.parametrize(
    ("requires", "streams", "said"),
    [
        ((On("other", ColumnSquares),), {}, "requires calibration data 'other'; pass them with `streams`"),
        ((ColumnSquares,), {"other": [tokens()]}, "nothing requires the calibration data 'other'"),
    ],
)
def test_streams_are_given_exactly_as_required(requires, streams, said):
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(tiny_llama(), Keeping(*requires), 0.5, None, batches(), streams=streams)


class Histogram(InputStatistic):
    """Counts of the inputs' magnitudes, in `bins` of one width up to `top`."""

    bins = 8
    top = 4.0

    def __init__(self, shape, dtype, device):
        self.total = torch.zeros(self.bins, dtype=dtype, device=device)

    def add(self, inputs):
        self.total += torch.histc(inputs.abs().clamp(max=self.top), self.bins, 0, self.top)


def test_a_statistic_has_parameters_that_are_part_of_what_it_is():
    fine = Histogram.of(bins=32)
    assert fine is Histogram.of(bins=32)
    assert fine is not Histogram
    assert issubclass(fine, Histogram)
    assert fine.__name__ == "Histogram(bins=32)"
    assert Histogram.of(bins=8) is Histogram
    assert Histogram.of(bins=4).of(top=1.0) is Histogram.of(bins=4, top=1.0)
    assert Histogram.of(bins=4).of(bins=8) is Histogram
    found = seen(Histogram, fine, Histogram.of(bins=2, top=1.0), data=batches())
    for of_layer in found.values():
        assert [len(total) for total, _ in of_layer.values()] == [8, 32, 2]
        assert of_layer[fine][0].sum() == 6 * 24 * found_width(of_layer)
        torch.testing.assert_close(of_layer[fine][0].view(8, 4).sum(1), of_layer[Histogram][0])
    with pytest.raises(PruneForgeError, match="unknown parameter of Histogram 'bin'; did you mean 'bins'"):
        Histogram.of(bin=3)
    with pytest.raises(PruneForgeError, match="unknown parameter of Histogram 'in_cache'"):
        Histogram.of(in_cache=True)
    with pytest.raises(PruneForgeError, match=r"parameter bins=\[3\] of Histogram cannot be hashed"):
        Histogram.of(bins=[3])


def found_width(of_layer):
    return round(float(of_layer[Histogram][0].sum()) / (6 * 24))


class Powers(GradientSum):
    exponent = 1

    def add(self, gradient):
        self.total += gradient.abs() ** self.exponent


def test_parameters_of_gradient_statistics_have_files_of_their_own(model, tmp_path, gradient_cache):
    for number, exponent in enumerate((2, 3, 3)):
        metric = Keeping(Powers.of(exponent=exponent))
        run = pruneforge.prune(model, metric, 0.5, None, batches(), output=tmp_path / str(number))
        assert (run.report["measured"]["gradient_cache"]["reused"] > 0) == (number == 2)
    files = list(gradient_cache.glob("*/*.safetensors"))
    assert len(files) == 2 * 21
    assert {"Powers(exponent=2)" in file.name for file in files} == {True, False}


class Entropy(Objective):
    def losses(self, output, batch):
        logs = output.logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).mean(1)


class Strange(Objective):
    def losses(self, output, batch):
        return output.logits.sum()


def test_an_objective_takes_the_place_of_the_models_loss(model, tmp_path, gradient_cache):
    found, dense = seen(GradientSum, data=batches(), objective=Entropy()), tiny_llama()
    expected = {name: torch.zeros_like(module.weight) for name, module in linears(dense)}
    for row in tokens():
        logs = dense(row[None]).logits.log_softmax(-1)
        loss = F.cross_entropy(logs.flatten(0, 1), logs.exp().flatten(0, 1))  # against its own probabilities
        assert loss > 0
        own = -(logs.exp() * logs).sum(-1).mean()
        for (name, _), gradient in zip(
            linears(dense), torch.autograd.grad(own, [module.weight for _, module in linears(dense)]), strict=True
        ):
            expected[name] += gradient
    for name, total in expected.items():
        torch.testing.assert_close(found[name][GradientSum][0], total)
    # Its gradients are not taken for the model's, nor the other way round.
    for number, objective in enumerate((None, Entropy(), None)):
        more = {"objective": objective} if objective else {}
        run = pruneforge.prune(model, "gblm", 0.5, None, batches(), output=tmp_path / str(number), **more)
        assert (run.report["measured"]["gradient_cache"]["reused"] > 0) == (number == 2)
        assert run.report.get("objective", {}).get("name") == ("entropy" if objective else None)


def linears(model):
    return [
        (name, module)
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    ]


def test_an_objective_without_a_say_or_of_another_shape_is_refused():
    with pytest.raises(PruneForgeError, match="objective 'entropy' has no say"):
        pruneforge.prune(tiny_llama(), "wanda", 0.5, None, batches(), objective=Entropy())
    with pytest.raises(PruneForgeError, match=r"objective 'strange' made \(\) for 3 samples; it must be one loss for"):
        pruneforge.prune(tiny_llama(), "gblm", 0.5, None, batches(), objective=Strange())


class Weakest(Metric):
    """Prunes the weakest weights of the whole block, by hand, and notes how many layers it saw."""

    requires = (ColumnSquares,)
    scope = None

    def prune_block(self, layers, stats, patterns):
        scores = {la.name: la.weight.abs() * stats[la.name][ColumnSquares].per_sample().sqrt() for la in layers}
        every = torch.cat([score.flatten() for score in scores.values()])
        count = pruned_count(every.numel(), patterns[layers[0].name].sparsity)
        edge = every.sort().values[count]
        notes = (f"one of {len(layers)}",)
        return {name: Pruned(score >= edge, notes=notes) for name, score in scores.items()}


class Forgetful(Weakest):
    def prune_block(self, layers, stats, patterns):
        made = super().prune_block(layers, stats, patterns)
        del made[layers[-1].name]
        return made


def test_a_metric_decides_over_a_block_as_the_scope_block_does(model, tmp_path):
    expected = pruneforge.prune(model, "wanda", 0.5, None, batches(), options={"scope": "block"})
    found = pruneforge.prune(model, Weakest(), 0.5, None, batches(), output=tmp_path / "out")
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert found.report["warnings"][0].endswith("one of 7")
    with pytest.raises(PruneForgeError, match=r"made nothing of layer 'model\.layers\.0\.mlp\.down_proj'"):
        pruneforge.prune(tiny_llama(), Forgetful(), 0.5, None, batches())
    assert json.loads(json.dumps(found.report["sparsity"]))["reached"] == 0.5


class Undecided(Weakest):
    requires = (ColumnSquares,)

    def score(self, layer, stats):
        return layer.weight.abs()

    def prune_block(self, layers, stats, patterns):
        return {layer.name: None for layer in layers}


class Sparing(Weakest):
    def prune_block(self, layers, stats, patterns):
        return {layer.name: Pruned(torch.ones(layer.shape, dtype=torch.bool)) for layer in layers}


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (Undecided(), "metric 'undecided' made nothing of layer 'model.layers.0.self_attn.q_proj'"),
        (Sparing(), "metric 'sparing' pruned 0.0% of block 'model.layers.0', where 50.0% was asked for"),
    ],
)
def test_a_block_decision_is_checked(metric, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny_llama(), metric, 0.5, None, batches())
    assert said in str(error.value)


class Loud(BlockGradientStatistic, GradientSum):
    @staticmethod
    def loss(output, batch, target):
        raise ValueError("boo")


class Flat(BlockGradientStatistic, GradientSum):
    @staticmethod
    def loss(output, batch, target):
        return output.detach().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("requires", "settings", "said"),
    [
        (Loud, {}, "statistic Loud failed on block 'model.layers.0': ValueError: boo"),
        (Flat, {}, "statistic Flat made a loss of (3,) for 3 samples; it must be one number for each, made of"),
        (Distance, {"propagate": "dense"}, "with `propagate` dense the two are the same"),
        (ColumnSquares, {"streams": "c4"}, "streams='c4' must be a mapping of names"),
    ],
)
def test_what_cannot_be_required_is_said_in_one_line(requires, settings, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny_llama(), Keeping(requires), 0.5, None, batches(), **settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


class ByStream(Allocator):
    requires = (On("other", ColumnSquares),)

    def measure(self, block, stats, score):
        return {name: float(of_layer[self.requires[0]].total.sum()) for name, of_layer in stats.items()}

    def allocate(self, measures, sizes, sparsity):
        return {name: sparsity for layers in sizes.values() for name in layers}


def test_runs_in_company_have_recipes_of_their_own(model, tmp_path):
    metrics = {"mine": Keeping(On("other", GradientSum)), "plain": "magnitude", "gblm": "gblm"}
    found = pruneforge.prune_each(
        model, metrics, [0.5], batches(), streams={"other": batches()}, objective=Entropy(), output=tmp_path / "all"
    )
    described = {name: run.report["calibration"] for name, run in found.items()}
    assert ["streams" in (each or {}) for each in described.values()] == [True, False, False]
    assert [run.report.get("objective") is not None for run in found.values()] == [True, False, True]
    alone = pruneforge.prune(model, "magnitude", 0.5, None, output=tmp_path / "alone", propagate="dense")
    assert outcome(found["plain-0.5"].folder) == outcome(alone.folder)


def test_an_allocator_may_look_at_named_data():
    allocator = ByStream()
    with pytest.raises(PruneForgeError, match="requires calibration data 'other'"):
        pruneforge.prune(tiny_llama(), "magnitude", 0.5, None, batches(), allocator=allocator)
    found = pruneforge.prune(
        tiny_llama(), "magnitude", 0.5, None, batches(), allocator=allocator, streams={"other": batches()}
    )
    assert found.report["sparsity"]["reached"] == 0.5


def test_an_estimate_knows_block_decisions():
    assert pruneforge.estimate(tiny_llama(), Weakest(), batches()).seconds["prune"] > 0


def test_a_metric_that_decides_over_blocks_takes_no_scope_beyond_a_layer():
    with pytest.raises(PruneForgeError, match="scope=block compares scores of several layers"):
        pruneforge.prune(tiny_llama(), Weakest(scope="block"), 0.5, None, batches())
