"""The contrastive loss, its gradients sample by sample, and pairs of texts."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_llama, tokens
from test_bert import FAMILIES, SMALL

import pruneforge
from pruneforge import Batch, GradientSquares, GradientSum, Metric, PruneForgeError, Request
from pruneforge.engine import budget
from pruneforge.plugins import loaded_plugins
from pruneforge.testing import run_checks


def contrastive(**options):
    return loaded_plugins().registry.create("objective", "contrastive", options)


def encoder(family="bert"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    return transformers.AutoModel.from_config(config).double().eval()


def texts(samples=6, left=False):
    ids = torch.randint(3, 96, (samples, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[4, 3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask.flip(1) if left else mask}


def loss_by_loops(hidden, mask, pooling, scale):
    """The sum of InfoNCE over the pairs of a batch, one pair after the other."""
    embeddings = []
    for states, valid in zip(hidden, mask, strict=True):
        real = [state for state, is_real in zip(states, valid.tolist(), strict=True) if is_real]
        embeddings.append(sum(real) / len(real) if pooling == "mean" else real[-1])
    queries, positives = embeddings[0::2], embeddings[1::2]
    total = 0.0
    for number, query in enumerate(queries):
        alike = [torch.dot(query, p) / (query.norm() * p.norm()) * scale for p in positives]
        total = total + torch.stack([each.exp() for each in alike]).sum().log() - alike[number]
    return total


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", [{}, {"pooling": "last", "scale": 5.0}])
def test_losses_are_infonce_of_the_pairs(options, left):
    data = texts(left=left)
    hidden = torch.randn(6, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    hidden[data["attention_mask"] == 0] = math.nan  # padding has no part
    batch = Batch(data, 6, data["attention_mask"].bool())
    losses = contrastive(**options).losses(SimpleNamespace(last_hidden_state=hidden), batch)
    expected = loss_by_loops(hidden, data["attention_mask"], options.get("pooling", "mean"), options.get("scale", 20.0))
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.sum(), expected)
    assert torch.equal(losses[0::2], losses[1::2])


class Keeping(Metric):
    requires = (GradientSum, GradientSquares)

    def __init__(self):
        super().__init__()
        self.seen = {}

    def score(self, layer, stats):
        self.seen[layer.name] = stats[GradientSum].total.clone(), stats[GradientSquares].total.clone()
        return layer.weight.abs()


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_gradients_of_samples_sum_to_the_gradient_of_the_loss(family, monkeypatch):
    monkeypatch.setattr(budget, "HEAD_LOGITS", 1)  # the batch stays whole, however many logits there are
    model, metric, data = encoder(family), Keeping(), texts()
    pruneforge.prune(encoder(family), metric, 0.5, None, [data], propagate="dense", objective="contrastive")
    hidden = model(**data).last_hidden_state
    loss_by_loops(hidden, data["attention_mask"], "mean", 20.0).backward()
    weights = dict(model.named_parameters())
    assert metric.seen
    for name, (total, _) in metric.seen.items():
        torch.testing.assert_close(total, weights[f"{name}.weight"].grad, rtol=1e-6, atol=1e-9)


def test_a_samples_own_gradient_flows_through_its_tokens():
    """Of the last layer, by a copy of the weight for each sample."""
    model, metric, data = encoder(), Keeping(), texts()
    pruneforge.prune(encoder(), metric, 0.5, None, [data], propagate="dense", objective="contrastive")
    name = "encoder.layer.1.output.dense"
    layer = model.get_submodule(name)
    copies = layer.weight.detach().repeat(6, 1, 1).requires_grad_()
    layer.forward = lambda x: torch.einsum("sti,soi->sto", x, copies) + layer.bias
    loss_by_loops(model(**data).last_hidden_state, data["attention_mask"], "mean", 20.0).backward()
    torch.testing.assert_close(metric.seen[name][1], copies.grad.square().sum(0))


@pytest.mark.parametrize("samples", [2, 5])
def test_a_batch_without_two_pairs_is_refused(samples):
    with pytest.raises(PruneForgeError, match=f"a batch has {samples} samples; use an even `batch_size` of 4 or more"):
        pruneforge.prune(encoder(), "gblm", 0.5, None, [texts()["input_ids"][:samples]], objective="contrastive")


def test_a_model_without_a_last_hidden_state_is_refused():
    with pytest.raises(PruneForgeError, match="needs the last hidden state, and the model puts out CausalLMOutput"):
        pruneforge.prune(tiny_llama(), "gblm", 0.5, None, [tokens()], objective="contrastive")


def test_an_encoder_without_a_head_has_no_loss_of_its_own(tmp_path):
    encoder().save_pretrained(tmp_path / "model")
    with pytest.raises(PruneForgeError, match="has neither logits nor a loss of its own; take gradients of one with"):
        pruneforge.prune(tmp_path / "model", "gblm", 0.5, None, [texts()], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    labelled = {**texts(), "labels": texts()["input_ids"]}
    with pytest.raises(PruneForgeError, match="no use for the labels"):
        pruneforge.prune(encoder(), "wanda", 0.5, None, [labelled])


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert"])
def test_an_encoder_without_a_head_is_streamed_and_loads_as_an_ordinary_folder(family, tmp_path):
    encoder(family).save_pretrained(tmp_path / "model")
    settings = {"objective": "contrastive", "propagate": "dense"}
    expected = pruneforge.prune(tmp_path / "model", "gblm", 0.5, None, [texts()], **settings)
    pruneforge.prune(tmp_path / "model", "gblm", 0.5, None, [texts()], output=tmp_path / "out", **settings)
    assert expected.report["objective"]["name"] == "contrastive"
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    for (name, ours), theirs in zip(again.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def file_of_pairs(folder, pairs=7):
    path = folder / "pairs.jsonl"
    lines = [{"query": f"what is {n}", "positive": f"the number {n}, {'and so ' * n}on"} for n in range(pairs)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def pairs_of(path, **options):
    return loaded_plugins().registry.create("source", f"pairs:{path}", options)


def test_pairs_stay_together_and_are_padded(tmp_path):
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    batches = list(pairs_of(file_of_pairs(tmp_path)).calibration(Request(tokenizer, 12, 24, 4, 3)))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4]
    seen = []
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 24
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        told = [tokenizer.decode(ids[valid], skip_special_tokens=True) for ids, valid in rows]
        for query, positive in zip(told[0::2], told[1::2], strict=True):
            assert positive.startswith(f"the number {query.removeprefix('what is ')}")
            seen.append(query)
    assert len(set(seen)) == 6


def test_pairs_keep_what_sources_promise(tmp_path):
    assert [said for _, said in run_checks([pairs_of(file_of_pairs(tmp_path, 80))]) if said is not None] == []


@pytest.mark.parametrize(
    ("samples", "text", "said"),
    [
        (3, None, "3 `samples` are not a number of pairs"),
        (20, None, "holds 7 pairs, and 20 samples are 10"),
        (4, '{"query": "a"}', "line 1 of .* is not a JSON object with text in fields 'query' and 'positive'"),
    ],
)
def test_pairs_that_cannot_be_drawn_are_refused(tmp_path, samples, text, said):
    path = file_of_pairs(tmp_path)
    if text:
        path.write_text(text)
    with pytest.raises(PruneForgeError, match=said):
        list(pairs_of(path).calibration(Request(transformers.ByT5Tokenizer(), samples, 24, 4, 0)))
