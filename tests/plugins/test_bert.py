"""Encoders of text: pruned as the reference prunes them, in memory and streamed."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
import transformers
from conftest import tokens

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.plugins import loaded_plugins

METRICS = ["magnitude", "wanda", "sparsegpt", "gblm"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}

FAMILIES = {
    "bert": SIZES,
    "bert, a classification head": SIZES,
    "roberta": SIZES,
    "roberta, a classification head": SIZES,
    "xlm-roberta": SIZES,
    "camembert": SIZES,
    "electra": {**SIZES, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "distilbert, a classification head": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "mpnet": SIZES,
    "modernbert": {**SIZES, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
}


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name, _, head = family.partition(", ")
    config = transformers.AutoConfig.for_model(name, **SMALL, **FAMILIES[family])
    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForMaskedLM
    return auto.from_config(config).double().eval()


class Encoder(reference.LanguageModel):
    """How the reference runs an encoder: the loss is of the labels, or of what the adapter says without them."""

    @staticmethod
    def blocks(model):
        name, part = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
        return [(f"{name}.{i}", block) for i, block in enumerate(part)]

    @staticmethod
    def run(model, sample):
        return model(**{name: value for name, value in sample.items() if name != "labels"})

    @staticmethod
    def loss(model, sample):
        logits = Encoder.run(model, sample).logits[0]
        if logits.dim() == 1:
            target = sample["labels"][0] if "labels" in sample else logits.argmax()
            return torch.nn.functional.cross_entropy(logits, target)
        targets = sample["input_ids"][0].masked_fill(sample["attention_mask"][0] == 0, -100)
        return torch.nn.functional.cross_entropy(logits, sample["labels"][0] if "labels" in sample else targets)


def padded() -> list[dict]:
    """Four texts of unequal length, padded on the right."""
    ids, mask = tokens(4).clamp(min=3), torch.ones(4, 24).long()
    for row, length in enumerate([24, 17, 9, 24]):
        mask[row, length:] = 0
        ids[row, length:] = 0
    return [{"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, mask, strict=True)]


def batched(samples: list[dict]) -> list[dict]:
    return [{key: torch.cat([s[key] for s in samples[i : i + 2]]) for key in samples[0]} for i in (0, 2)]


def assert_same_masks(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("metric", METRICS)
def test_masks_and_weights_equal_the_reference(metric, pattern):
    model, samples = tiny("bert"), padded()
    expected_model, expected = reference.prune(model, metric, samples, pattern=pattern, kind=Encoder)
    text = f"{pattern[0]}:{pattern[1]}" if pattern else None
    result = pruneforge.prune(model, metric, 0.5, text, batched(samples))
    assert_same_masks(result.masks, expected)
    for (name, ours), theirs in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_pruned_as_the_reference_prunes_it(family):
    model, samples = tiny(family), padded()
    _, expected = reference.prune(model, "gblm", samples, kind=Encoder)
    result = pruneforge.prune(model, "gblm", 0.5, None, batched(samples))
    assert result.report["model"]["adapter"] == "bert"
    assert_same_masks(result.masks, expected)


@pytest.mark.parametrize("family", ["bert", "bert, a classification head"])
def test_labels_are_what_gradients_are_of(family):
    model, samples = tiny(family), padded()
    for number, sample in enumerate(samples):
        words = sample["input_ids"].masked_fill(torch.arange(24)[None] % 5 != 2, -100)
        sample["labels"] = torch.tensor([number % 3]) if "," in family else words
    _, expected = reference.prune(model, "gblm", samples, kind=Encoder)
    _, others = reference.prune(model, "gblm", padded(), kind=Encoder)
    result = pruneforge.prune(copy.deepcopy(model), "gblm", 0.5, None, batched(samples))
    assert_same_masks(result.masks, expected)
    assert any(not torch.equal(others[name], mask) for name, mask in expected.items())
    assert "label" in result.report["calibration"]["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_streamed_and_loads_as_an_ordinary_folder(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    expected = pruneforge.prune(tmp_path / "model", "wanda", 0.5, None, batched(padded()))
    result = pruneforge.prune(tmp_path / "model", "wanda", 0.5, None, batched(padded()), output=tmp_path / "out")
    assert result.report["warnings"] == []  # it was streamed
    assert_same_masks(result.masks, expected.masks)
    again = type(model).from_pretrained(tmp_path / "out")
    for (name, ours), theirs in zip(again.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("metric", METRICS)
def test_streaming_gives_what_a_run_in_memory_gives(metric, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "model")
    batches = batched(padded())
    expected = pruneforge.prune(tmp_path / "model", metric, 0.5, None, batches)
    pruneforge.prune(tmp_path / "model", metric, 0.5, None, batches, output=tmp_path / "out")
    expected.model.save_pretrained(tmp_path / "whole")
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "whole")
    assert set(ours.tensors) == set(theirs.tensors)
    for name, location in ours.tensors.items():
        assert torch.equal(ours.read(location), theirs.read(theirs.tensors[name])), name


def test_robertas_context_is_without_the_positions_of_padding():
    adapter = loaded_plugins().registry.create("adapter", "bert")
    assert adapter.context_length(tiny("roberta")) == 63  # its padding id is 0, so tokens begin at position 1
    assert adapter.context_length(tiny("bert")) == 64
    longest = torch.full((1, 63), 5)
    model = tiny("roberta")
    assert model(input_ids=longest).logits.shape[1] == 63
    with pytest.raises(PruneForgeError, match="64 tokens long, and the model's context is 63"):
        adapter.batch(torch.full((1, 64), 5), model)


IDS = torch.full((2, 4), 5)


@pytest.mark.parametrize(
    ("family", "labels", "said"),
    [
        ("bert", torch.ones(2), "labels of a batch must be int64 (2, 4)"),
        ("bert", torch.full((2, 4), 96), "from 96 to 96; there are 96 classes"),
        ("bert, a classification head", torch.tensor([0, 3]), "from 0 to 3; there are 3 classes"),
        ("bert, a classification head", torch.zeros(2), "got torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_refused(family, labels, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(tiny(family), "wanda", 0.5, None, [{"input_ids": IDS, "labels": labels}])
    assert said in str(error.value)


BERT = {**SMALL, **SIZES}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            lambda: transformers.BertForTokenClassification(transformers.BertConfig(**BERT)),
            "has a head that neither predicts masked tokens nor classifies texts",
        ),
        (
            lambda: transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True)),
            "has a head that neither predicts masked tokens nor classifies texts",
        ),
        (
            lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**{**BERT, "num_labels": 1})),
            "does not choose one of several classes",
        ),
    ],
)
def test_other_heads_are_declined_with_a_reason(model, said):
    module = model()
    with pytest.raises(PruneForgeError) as error:
        pruneforge.prune(module, "magnitude", 0.5)
    assert f"bert: {type(module).__name__}" in str(error.value) or f"of {type(module).__name__} " in str(error.value)
    assert said in str(error.value)


def test_a_folder_of_another_head_is_declined_by_its_architecture(tmp_path):
    transformers.BertForTokenClassification(transformers.BertConfig(**BERT)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        PruneForgeError, match="its configuration names BertForTokenClassification, which is no encoder"
    ):
        pruneforge.prune(tmp_path / "model", "magnitude", 0.5)


def test_perplexity_of_a_model_that_sees_all_tokens_is_refused(tmp_path, checkpoint):
    (tmp_path / "text.txt").write_text("Some words, and some more of them. " * 40)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(PruneForgeError, match="predict the next token, and BertForMaskedLM does not"):
        pruneforge.evaluate(tiny("bert"), "perplexity", data=tmp_path / "text.txt", processor=tokenizer)
