"""Perplexity by its protocol, and the real lm-eval on a local task."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import tiny_llama
from reference import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruneforge
from pruneforge import PruneForgeError


def test_perplexity_is_the_plain_computation(checkpoint, tmp_path):
    from pruneforge_demo import corpus

    rows = corpus.documents("evaluation")[:6]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = pruneforge.evaluate(checkpoint, "perplexity", data=file, window=64, dtype="float32", batch_size=5)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert found["perplexity"] == pytest.approx(perplexity(model, ids, 64), rel=1e-5)
    assert found["window"] == 64
    assert found["windows"] == len(ids) // 64
    assert found["tokens"] == len(ids) // 64 * 64
    assert found["data"]["file"] == "rows.jsonl"


def test_perplexity_keeps_the_loss_of_each_window(checkpoint):
    found = pruneforge.evaluate(checkpoint, "perplexity", data="python-docs", window=64, limit=3, items=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    from pruneforge_demo import corpus

    ids = tokenizer("\n\n".join(corpus.documents("evaluation")[:30]), verbose=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        windows = [torch.tensor([ids[start : start + 64]]) for start in (0, 64, 128)]
        losses = [model(window, labels=window).loss.item() for window in windows]
    assert found["items"]["id"] == ["0", "1", "2"]
    assert found["items"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)


def test_dense_perplexity_of_the_pretrained_model_is_the_published_one(shared_data):
    found = pruneforge.evaluate(
        shared_data / "stories260K", "perplexity", data=shared_data / "tinystories.txt", window=512
    )
    assert round(found["perplexity"], 2) == 6.27


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(checkpoint, tmp_path):
    model = tiny_llama(torch.float32, vocab_size=1536)
    model.lm_head.weight.data.zero_()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = pruneforge.evaluate(model, "perplexity", data="python-docs", window=32, limit=5, processor=tokenizer)
    assert found["perplexity"] == pytest.approx(1536, rel=1e-4)
    assert found["windows"] == 5


def test_overlap_of_calibration_and_evaluation_text_is_warned_of(checkpoint, tmp_path):
    from pruneforge_demo import corpus

    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(corpus.documents("evaluation")[:30]))

    def prune(part, **more):
        return pruneforge.prune(checkpoint, "wanda", 0.5, None, f"{file}{part}", samples=4, seqlen=128, **more)

    same = pruneforge.evaluate(prune(""), "perplexity", data=file, window=128)
    assert len(same["warnings"]) == 1
    assert "calibration text stands in the evaluation text" in same["warnings"][0]
    output = tmp_path / "pruned"
    prune("[:50%]", output=output)
    half = pruneforge.evaluate(output, "perplexity", data=f"{file}[:50%]", window=128)
    assert len(half["warnings"]) == 1
    other = pruneforge.evaluate(output, "perplexity", data=f"{file}[50%:]", window=128)
    assert other["warnings"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "python-docs", "window": 4096}, "longer than the model's context of 256"),
        ({"data": "python-docs", "window": 1}, "window=1"),
        ({}, "option data of perplexity"),
        ({"data": "python-docs", "include_path": "x"}, "unknown option of perplexity 'include_path'"),
    ],
)
def test_bad_perplexity_options_are_named(checkpoint, options, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.evaluate(checkpoint, "perplexity", **options)
    assert said in str(error.value)


def test_too_little_text_and_no_tokenizer_are_named(checkpoint, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("two words")
    with pytest.raises(PruneForgeError, match="less than one window of 256"):
        pruneforge.evaluate(checkpoint, "perplexity", data=file)
    with pytest.raises(PruneForgeError, match="without a tokenizer"):
        pruneforge.evaluate(tiny_llama(), "perplexity", data=file)


def test_text_is_no_task_for_a_model_of_images(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 100)
    with pytest.raises(PruneForgeError, match="without a tokenizer"):
        pruneforge.evaluate("demo:image", "perplexity", data=tmp_path / "text.txt", window=8)


def test_the_results_for_a_pruned_folder_are_added_to_its_report(checkpoint, tmp_path):
    output = tmp_path / "pruned"
    pruneforge.prune(checkpoint, "magnitude", 0.5, output=output)

    def evaluate(window):
        return pruneforge.evaluate(output, "perplexity", data="python-docs", window=window, limit=2)

    found = [evaluate(32), evaluate(64), evaluate(32)]
    recorded = pruneforge.load(output).report["evaluation"]
    assert recorded == [found[1], found[2]]
    assert sorted(path.name for path in output.iterdir() if path.name.startswith(".")) == []


def test_options_of_the_source_reach_it(checkpoint, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"body": "a function returns a value " * 40}) + "\n")
    column = {"column": "body"}
    found = pruneforge.evaluate(checkpoint, "perplexity", data=file, window=32, source_options=column)
    assert found["windows"] > 2


@pytest.fixture(scope="module")
def local_task(tmp_path_factory):
    """A multiple-choice task over local data, in lm-eval's own format; for each folder all tasks are read again."""
    tmp_path = tmp_path_factory.mktemp("local")
    questions = [
        {"question": f"{i} plus {i} is", "choices": [str(2 * i), "many", "none"], "answer": 0} for i in range(6)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return folder, questions


def test_lm_eval_runs_a_local_task(checkpoint, local_task):
    folder, questions = local_task
    found = pruneforge.evaluate(checkpoint, "lm-eval:sums", include_path=folder, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def log_likelihood(text, choice):
        prompt, whole = tokenizer(text).input_ids, tokenizer(f"{text} {choice}").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logits[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    right = [
        max(range(3), key=lambda c: log_likelihood(q["question"], q["choices"][c])) == q["answer"] for q in questions
    ]
    assert found["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found["mean_accuracy"] == found["results"]["sums"]["acc,none"]
    assert math.isfinite(found["results"]["sums"]["acc_stderr,none"])
    assert found["documents"] == {"sums": 6}
    assert found["recipe"]["options"]["include_path"] == str(folder)


def test_lm_eval_limit_is_applied_and_said(checkpoint, local_task):
    found = pruneforge.evaluate(checkpoint, "lm-eval:sums", include_path=local_task[0], limit=2)
    assert found["documents"] == {"sums": 2}
    assert "first 2 documents" in found["warnings"][0]


def test_the_seven_zero_shot_tasks_are_the_published_ones_and_known_to_lm_eval():
    from pruneforge.plugins import loaded_plugins
    from pruneforge_lm_eval.evaluator import _task_manager

    tasks = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    for spec in ("zero-shot-7", "lm-eval:zero-shot-7"):
        assert loaded_plugins().registry.create("evaluator", spec)._names() == tasks
    manager = _task_manager(None)
    assert all(manager.match_tasks([task]) == [task] for task in tasks)


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("lm-eval:no_such_task", {}, "lm-eval knows no task no_such_task"),
        ("lm-eval:", {}, "needs the name of a task"),
        ("lm-eval", {}, "option tasks of lm-eval"),
        ("lm-eval:sums", {"include_path": "nowhere"}, "include-path 'nowhere' is no folder"),
        ("perplexitty", {}, "did you mean 'perplexity'"),
    ],
)
def test_bad_tasks_are_named(checkpoint, task, options, said):
    with pytest.raises(PruneForgeError) as error:
        pruneforge.evaluate(checkpoint, task, **options)
    assert said in str(error.value)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_llama(torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruneForgeError):
        pruneforge.evaluate(model, "perplexity", data="python-docs")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
