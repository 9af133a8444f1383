"""The agreement of a pruned model with the dense one, against softmaxes in float64 by hand."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_llama
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.testing import check_evaluator
from pruneforge.testing.evaluator import Case
from pruneforge.testing.models import examples
from pruneforge_agreement.evaluator import POSITIONS, _pair

TEXT = {"data": "python-docs", "window": 16, "limit": 3}
IMAGES = {"data": "digits", "limit": 6, "workers": 0}


def by_hand(dense: list[float], pruned: list[float]) -> tuple[bool, float]:
    """Whether two lists of logits have the same largest, and KL(dense || pruned) of their softmaxes."""

    def softmax(logits):
        largest = max(logits)
        powers = [math.exp(logit - largest) for logit in logits]
        total = math.fsum(powers)
        return [power / total for power in powers]

    p, q = softmax(dense), softmax(pruned)
    same = dense.index(max(dense)) == pruned.index(max(pruned))
    return same, math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def expected_of_text(pruned, checkpoint) -> list[tuple[float, float]]:
    """The agreement and divergence of each window, position by position."""
    from pruneforge_demo import corpus

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("\n\n".join(corpus.documents("evaluation")[:30]), verbose=False)["input_ids"]
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    of_windows = []
    for start in (0, 16, 32):
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            rows = [model(window).logits[0].double().tolist() for model in (dense, pruned)]
        pairs = [by_hand(*row) for row in zip(*rows, strict=True)]
        of_windows.append((sum(same for same, _ in pairs) / 16, sum(kl for _, kl in pairs) / 16))
    return of_windows


def expected_of_images(pruned) -> list[tuple[float, float]]:
    from pruneforge_demo import digits
    from pruneforge_demo.image import ImageDemo

    dense = timm.create_model(f"local-dir:{ImageDemo().checkpoint()}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(dense), is_training=False)
    pixels, _ = digits.images("evaluation")
    of_images = []
    for place in range(6):
        image = transform(Image.fromarray(pixels[place * len(pixels) // 6]))[None]
        with torch.no_grad():
            of_images.append(by_hand(*(model(image)[0].double().tolist() for model in (dense, pruned))))
    return of_images


def assert_is(found, expected):
    assert found["items"]["agreement"] == [same for same, _ in expected]
    assert found["items"]["kl"] == pytest.approx([kl for _, kl in expected], rel=1e-4, abs=1e-6)
    assert found["agreement"] == pytest.approx(sum(same for same, _ in expected) / len(expected))
    assert found["kl"] == pytest.approx(sum(kl for _, kl in expected) / len(expected), rel=1e-4)


def test_text_is_compared_token_by_token_in_memory_and_from_a_folder(checkpoint, tmp_path):
    asked = {"sparsity": 0.6, "dtype": "float32"}
    result = pruneforge.prune("demo:text", "magnitude", **asked)
    expected = expected_of_text(result.model, checkpoint)
    found = pruneforge.evaluate(result, "agreement", TEXT, items=True, batch_size=2)
    assert_is(found, expected)
    assert 0 < found["agreement"] < 1
    assert found["kl"] > 0.1
    assert found["items"]["id"] == ["0", "1", "2"]
    assert (found["window"], found["windows"], found["tokens"]) == (16, 3, 48)
    assert (found["dense"], found["warnings"]) == ("demo:text", [])
    pruneforge.prune("demo:text", "magnitude", **asked, output=tmp_path / "pruned")
    assert_is(pruneforge.evaluate(tmp_path / "pruned", "agreement", TEXT, items=True, dtype="float32"), expected)


def test_images_are_compared_in_memory_and_from_a_folder(tmp_path):
    result = pruneforge.prune("demo:image", "magnitude", 0.8)
    expected = expected_of_images(result.model)
    found = pruneforge.evaluate(result, "agreement", IMAGES, items=True, batch_size=4)
    assert_is(found, expected)
    assert (found["images"], found["skipped"], len(set(found["items"]["id"]))) == (6, 0, 6)
    pruneforge.prune("demo:image", "magnitude", 0.8, output=tmp_path / "pruned")
    assert_is(pruneforge.evaluate(tmp_path / "pruned", "agreement", IMAGES, items=True), expected)


@pytest.mark.parametrize(("model", "asked"), [("demo:text", TEXT), ("demo:image", IMAGES)])
def test_a_model_that_was_never_pruned_agrees_with_itself(model, asked):
    found = pruneforge.evaluate(model, "agreement", asked)
    assert (found["agreement"], found["kl"]) == (1.0, 0.0)
    assert "compared with itself" in found["warnings"][0]


class Sizes(TorchDispatchMode):
    """Records how many numbers the tensors have that are computed in float32."""

    def __init__(self):
        super().__init__()
        self.seen = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
            self.seen.append(found.numel())
        return found


def test_long_windows_are_compared_in_parts_that_are_small():
    dense, pruned = torch.randn(2, 700, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Sizes() as sizes:
        found = _pair(dense, pruned)
    p, q = dense.double().softmax(-1), pruned.double().softmax(-1)
    same = (dense.argmax(-1) == pruned.argmax(-1)).double().mean().item()
    assert found == pytest.approx((same, (p * (p.log() - q.log())).sum(-1).mean().item()), rel=1e-5)
    assert max(sizes.seen) == POSITIONS * 50 < 700 * 50 / 2


def test_images_need_no_labels_and_unreadable_ones_are_counted(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    result = pruneforge.prune("demo:image", "magnitude", 0.5)
    (tmp_path / "1.png").write_bytes(b"no image at all")
    found = pruneforge.evaluate(result, "agreement", data=tmp_path, workers=0, items=True)
    assert (found["images"], found["skipped"], found["items"]["id"]) == (2, 1, ["0.png", "2.png"])
    assert "1 corrupt images were left out: 1.png" in found["warnings"][0]
    strict = {"strict": True}
    with pytest.raises(PruneForgeError, match=r"image '1\.png' is corrupt"):
        pruneforge.evaluate(result, "agreement", data=tmp_path, workers=0, source_options=strict)
    for number in (0, 2):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(PruneForgeError, match="holds no readable image"):
        pruneforge.evaluate(result, "agreement", data=tmp_path, workers=0)


def test_a_dense_model_that_cannot_be_found_is_named_with_the_way_out(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "dense")
    pruneforge.prune(tmp_path / "dense", "magnitude", 0.5, output=tmp_path / "pruned")
    (tmp_path / "dense").rename(tmp_path / "moved")
    with pytest.raises(PruneForgeError) as error:
        pruneforge.evaluate(tmp_path / "pruned", "agreement", TEXT)
    where = f"model folder {str(tmp_path / 'dense')!r} does not exist"
    assert str(error.value) == (
        f"the dense model to compare with cannot be loaded: {where}; name its folder or hub id with `dense`"
    )
    moved = pruneforge.evaluate(tmp_path / "pruned", "agreement", TEXT, dense=tmp_path / "moved")
    assert 0 < moved["agreement"] < 1
    assert moved["dense"] == str(tmp_path / "moved")


@pytest.mark.parametrize("model", ["demo:text", "demo:image"])
def test_a_model_of_the_hub_is_compared_with_the_one_that_its_report_names(model, tmp_path, monkeypatch):
    """As the Hub's cache holds it: each file by the commit that `main` is."""
    asked, prefix = (TEXT, "") if model == "demo:text" else (IMAGES, "hf-hub:")
    repository = tmp_path / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    pruned = repository / "snapshots" / ("0" * 40)
    pruneforge.prune(model, "magnitude", 0.6, output=pruned)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = pruneforge.evaluate(f"{prefix}me/mine", "agreement", asked)
    local = pruneforge.evaluate(pruned, "agreement", asked)
    assert (found["agreement"], found["kl"]) == (local["agreement"], local["kl"]) != (1.0, 0.0)
    assert (found["dense"], found["warnings"]) == (model, [])
    (pruned / "pruneforge.json").unlink()
    unknown = pruneforge.evaluate(f"{prefix}me/mine", "agreement", asked)
    assert (unknown["agreement"], unknown["kl"]) == (1.0, 0.0)
    assert "compared with itself" in unknown["warnings"][0]


def test_a_dense_model_that_is_not_the_one_that_was_pruned_is_warned_of(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "dense")
    streamed = pruneforge.prune(tmp_path / "dense", "magnitude", 0.5, output=tmp_path / "pruned")
    in_memory = pruneforge.prune(tmp_path / "dense", "magnitude", 0.5)
    for pruned in (tmp_path / "pruned", in_memory):
        assert pruneforge.evaluate(pruned, "agreement", TEXT)["warnings"] == []
    assert pruneforge.evaluate(tmp_path / "pruned", "agreement", TEXT, dtype="float64")["warnings"] == []
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    next(iter(weights.values())).mul_(2)
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    for pruned, report in ((tmp_path / "pruned", streamed.report), (in_memory, in_memory.report)):
        (said,) = pruneforge.evaluate(pruned, "agreement", TEXT)["warnings"]
        start = f"the dense model {str(tmp_path / 'dense')!r} is not the one that was pruned: its fingerprint is "
        assert said.startswith(start)
        assert said.endswith(f", and the report's {report['model']['fingerprint']}")
    in_memory.model.double()  # of which the report's fingerprint says nothing
    assert pruneforge.evaluate(in_memory, "agreement", TEXT)["warnings"] == []


def test_a_model_that_was_pruned_in_memory_is_compared_with_the_dense_one_that_is_named(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    result = pruneforge.prune(model, "magnitude", 0.6, processor=tokenizer)
    with pytest.raises(PruneForgeError, match=r"it was a LlamaForCausalLM in memory; name .* with `dense`"):
        pruneforge.evaluate(result, "agreement", TEXT)
    found = pruneforge.evaluate(result, "agreement", TEXT, dense="demo:text", items=True)
    assert_is(found, expected_of_text(model, checkpoint))


def test_models_that_do_not_predict_the_same_tokens_are_not_compared(checkpoint, tmp_path):
    tiny_llama(torch.float32, vocab_size=2000).save_pretrained(tmp_path / "other")
    with pytest.raises(PruneForgeError, match="predicts one of 2000 classes or tokens, and this model one of 1536"):
        pruneforge.evaluate(checkpoint, "agreement", TEXT, dense=tmp_path / "other")


def test_bad_data_are_named(checkpoint, tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(
        "from pruneforge import Source\nclass Plain(Source):\n    def calibration(self, request): return []\n"
    )
    loaded_plugins().load_file(file)
    with pytest.raises(PruneForgeError, match="needs text or images, and source 'plain' gives neither"):
        pruneforge.evaluate(checkpoint, "agreement", data="plain")
    with pytest.raises(PruneForgeError, match="the model does not take images"):
        pruneforge.evaluate(checkpoint, "agreement", IMAGES)


def data_for(example, folder) -> dict[str, object]:
    """Text or images that an example of an adapter takes."""
    if "pixel_values" not in example.data[0]:
        (folder / "words.txt").write_text(" ".join(f"word{number}" for number in range(200)))
        return {"data": str(folder / "words.txt"), "window": 8, "limit": 3}
    Image.new("RGB", (40, 32), "green").save(folder / "green.png")
    return {"data": str(folder), "workers": 0}


def test_every_adapter_says_what_its_models_predict(tmp_path):
    tried = set()
    for adapter, example in examples(each=1):
        (tmp_path / adapter.name).mkdir()
        evaluator = pruneforge.create("evaluator", "agreement", **data_for(example, tmp_path / adapter.name))
        found = Case(evaluator, adapter, example).results()
        assert (found["agreement"], found["kl"]) == (1.0, 0.0), adapter.name
        tried.add(adapter.name)
    assert {"llama", "gpt", "bert", "timm", "vit"} <= tried


def test_it_keeps_the_promises_of_evaluators(tmp_path):
    (tmp_path / "words.txt").write_text(" ".join(f"word{number}" for number in range(200)))
    evaluator = pruneforge.create("evaluator", "agreement", data=str(tmp_path / "words.txt"), window=8, limit=5)
    assert check_evaluator(evaluator) is None
