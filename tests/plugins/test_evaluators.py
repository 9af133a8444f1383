"""Perplexity by its protocol, and the real lm-eval on a local task."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from reference import perplexity
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruneforge
from pruneforge import Example, PruneForgeError
from pruneforge.errors import UnfinishedError
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import LineProgress, Progress
from pruneforge.testing import run_checks
from pruneforge.testing.evaluator import Case


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
    exact = {"dtype": "float32", "items": True}
    found = pruneforge.evaluate(checkpoint, "perplexity", data="python-docs", window=64, limit=3, **exact)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    from pruneforge_demo import corpus

    ids = tokenizer("\n\n".join(corpus.documents("evaluation")[:30]), verbose=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        windows = [torch.tensor([ids[start : start + 64]]) for start in (0, 64, 128)]
        losses = [model(window, labels=window).loss.item() for window in windows]
    assert found["items"]["id"] == ["0", "1", "2"]
    assert found["items"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)


def test_a_text_is_tokenised_once_for_models_of_equal_tokenizers(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text of this test alone, which nothing has read before. " * 40)
    read = []

    class Counting(type(AutoTokenizer.from_pretrained(checkpoint))):
        def __call__(self, text, **more):
            read.append(text)
            return super().__call__(text, **more)

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = []
    for _ in range(2):
        tokenizer = Counting.from_pretrained(checkpoint)
        found.append(pruneforge.evaluate(model, "perplexity", data=text, window=16, processor=tokenizer))
    assert len(read) == 1
    assert found[0]["loss"] == found[1]["loss"]
    tokenizer.backend_tokenizer.normalizer = Lowercase()  # another one, which reads the text otherwise
    other = pruneforge.evaluate(model, "perplexity", data=text, window=16, processor=tokenizer)
    assert len(read) == 2
    assert other["loss"] != found[0]["loss"]


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


def sums(numbers) -> list[dict[str, object]]:
    """Questions of which a model gets some right, since the answer's place among the choices varies."""
    choices = {i: [str(2 * i), "many", "none"] for i in numbers}
    return [{"question": f"{i} plus {i} is", "choices": choices[i], "answer": i % 3} for i in numbers]


@pytest.fixture(scope="module")
def local_task(tmp_path_factory):
    """Multiple-choice tasks over local data, in lm-eval's own format; for each folder all tasks are read again."""
    tmp_path = tmp_path_factory.mktemp("local")
    for split, numbers in (("test", range(9)), ("train", range(20, 23))):
        lines = [json.dumps(question) + "\n" for question in sums(numbers)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "test.jsonl"}
    train: {tmp_path / "train.jsonl"}
test_split: test
fewshot_split: train
fewshot_config:
  sampler: first_n
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metadata:
  version: 1.0
metric_list:
"""
    (folder / "sums.yaml").write_text(f"task: sums\n{task}  - metric: acc\n")
    (folder / "likely.yaml").write_text(f"task: likely\n{task}  - metric: brier_score\n")
    generating = task.replace("multiple_choice", "generate_until").replace('doc_to_choice: "{{choices}}"\n', "")
    generating = generating.replace("metric_list", "generation_kwargs: {until: [x], max_gen_toks: 2}\nmetric_list")
    (folder / "said.yaml").write_text(f"task: said\n{generating}  - metric: exact_match\n")
    return folder


def right_answers(checkpoint, prompt="") -> list[int]:
    """Whether the right choice of each question is the likeliest, 1 or 0, one choice at a time in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def log_likelihood(text, choice):
        prompt, whole = tokenizer(text).input_ids, tokenizer(f"{text} {choice}").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logits[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    def answer(question):
        return max(range(3), key=lambda c: log_likelihood(prompt + question["question"], question["choices"][c]))

    return [int(answer(question) == question["answer"]) for question in sums(range(9))]


def test_lm_eval_runs_a_local_task(checkpoint, local_task):
    asked = {"include_path": local_task, "dtype": "float32", "items": True}
    found = pruneforge.evaluate(checkpoint, "lm-eval:sums", **asked)
    right = right_answers(checkpoint)
    assert 0 < sum(right) < 9
    assert found["items"] == {"id": [f"sums/{number}" for number in range(9)], "acc": right}
    results = found["results"]["sums"]
    assert results["acc,none"] == found["mean_accuracy"] == pytest.approx(sum(right) / 9)
    deviation = math.sqrt(sum((value - sum(right) / 9) ** 2 for value in right) / 8)
    assert results["acc_stderr,none"] == pytest.approx(deviation / 3)
    assert found["documents"] == {"sums": 9}
    assert found["recipe"]["options"]["include_path"] == str(local_task)


def test_lm_eval_gives_examples_in_the_prompt(checkpoint, local_task):
    asked = {"include_path": local_task, "dtype": "float32", "items": True, "num_fewshot": 2}
    found = pruneforge.evaluate(checkpoint, "lm-eval:sums", **asked)
    shown = [f"{shot['question']} {shot['choices'][shot['answer']]}\n\n" for shot in sums(range(20, 22))]
    assert found["items"]["acc"] == right_answers(checkpoint, "".join(shown))
    assert found["shots"] == {"sums": 2}


class Told(Progress):
    """Counts what is gone through, and prints it while everything else is redirected."""

    def __init__(self):
        self.steps = {}

    def track(self, items, description, total=None):
        self.steps[description] = [0, total]
        for item in items:
            yield item
            self.steps[description][0] += 1


@pytest.mark.parametrize(("task", "requests"), [("sums", 9 * 3), ("said", 9)])
def test_lm_eval_says_how_many_requests_are_done(task, requests, checkpoint, local_task, capsys):
    told = Told()
    pruneforge.evaluate(checkpoint, f"lm-eval:{task}", include_path=local_task, progress=told)
    assert told.steps["requests"] == [requests, requests]
    assert told.steps[f"lm-eval: {task}"][0] == 1
    pruneforge.evaluate(checkpoint, f"lm-eval:{task}", include_path=local_task, limit=1, progress=LineProgress())
    assert f"] lm-eval: {task}\n" in capsys.readouterr().err


def test_a_loss_beyond_any_perplexity_is_named(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    text = tmp_path / "text.txt"
    text.write_text("The parrot is no more. " * 50)
    with pytest.raises(PruneForgeError, match=r"loss on .* is [0-9.e+]+, too large for a perplexity"):
        pruneforge.evaluate(model, "perplexity", data=str(text), window=32, processor=tokenizer)


def test_questions_without_an_accuracy_are_no_items(checkpoint, local_task):
    found = pruneforge.evaluate(checkpoint, "lm-eval:likely,sums", include_path=local_task, limit=2, items=True)
    assert found["items"]["id"] == ["sums/0", "sums/1"]
    assert found["results"]["likely"]["brier_score,none"] > 0
    assert found["results"]["likely"]["brier_score_stderr,none"] == "N/A"
    assert found["warnings"] == [
        "mean_accuracy leaves out likely, without an accuracy (`acc,none`)",
        "only the first 2 documents of each task were used",
        "questions of likely have no accuracy, and are no items",
    ]
    assert found["mean_accuracy"] == sum(found["items"]["acc"]) / 2


def test_there_is_no_mean_accuracy_of_tasks_without_any(checkpoint, local_task):
    found = pruneforge.evaluate(checkpoint, "lm-eval:likely", include_path=local_task, limit=2)
    assert found["mean_accuracy"] is None
    assert found["warnings"][0] == "mean_accuracy leaves out likely, without an accuracy (`acc,none`)"


@pytest.mark.slow
def test_the_batch_size_that_lm_eval_used_is_reported(checkpoint, local_task, monkeypatch, capsys):
    from pruneforge_lm_eval import evaluator

    def used(task="lm-eval:sums", **asked):
        return pruneforge.evaluate(checkpoint, task, include_path=local_task, limit=2, **asked)["batch_size"]

    assert (used(), used(batch_size=3)) == (8, 3)
    assert evaluator.usual_batch_size(torch.device("cuda", 0)) == "auto"
    monkeypatch.setattr(evaluator, "usual_batch_size", lambda device: "auto")
    capsys.readouterr()
    assert used() == 64  # the most that the harness tries
    assert used("lm-eval:said") == used("lm-eval:sums,said") == "auto"  # it does not say what it found for `said`
    assert capsys.readouterr().out == ""  # where the command prints JSON


def test_lm_eval_keeps_the_promises_of_evaluators(checkpoint, local_task):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    evaluator = pruneforge.create("evaluator", "lm-eval:sums", include_path=str(local_task))
    case = Case(evaluator, pruneforge.create("adapter", "llama"), Example("the demo's", model, tokenizer, []))
    assert {said for _, said in run_checks([case])} == {None}


def test_lm_eval_limit_is_applied_and_said(checkpoint, local_task):
    found = pruneforge.evaluate(checkpoint, "lm-eval:sums", include_path=local_task, limit=2)
    assert found["documents"] == {"sums": 2}
    assert "first 2 documents" in found["warnings"][0]


def test_the_seven_zero_shot_tasks_are_the_published_ones_and_known_to_lm_eval():
    from pruneforge_lm_eval.evaluator import _task_manager

    tasks = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    for spec in ("zero-shot-7", "lm-eval:zero-shot-7"):
        assert loaded_plugins().registry.create("evaluator", spec)._names() == tasks
    manager = _task_manager(None, tuple(tasks))
    assert all(manager.match_tasks([task]) == [task] for task in tasks)


def test_the_folders_of_tasks_that_are_named_hold_what_the_whole_index_has():
    """Groups and names that no file has as its own need the whole index."""
    from lm_eval import tasks

    from pruneforge_lm_eval.evaluator import ZERO_SHOT_7, _folders, _task_manager

    names = (*ZERO_SHOT_7, "gsm8k", "wikitext", "piqa")
    some, every = _task_manager(None, names), _task_manager(None, ("mmlu",))
    assert len(some.all_tasks) < len(every.all_tasks) / 10
    for name in names:
        assert some._index[name].yaml_path == every._index[name].yaml_path
    root = Path(tasks.__file__).parent
    for name in ("mmlu", "glue", "super-glue-lm-eval-v1", "nothing"):
        assert _folders(root, [name, "boolq"]) == []


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


def test_a_full_device_is_one_line(checkpoint, tmp_path):
    file = tmp_path / "greedy.py"
    file.write_text(
        "import torch\nfrom pruneforge import Evaluator\n"
        "class Greedy(Evaluator):\n    def evaluate(self, subject):\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nOf 24 GiB.')\n"
    )
    loaded_plugins().load_file(file)
    with pytest.raises(UnfinishedError, match=r"^the device has no room left: CUDA out of memory; free") as error:
        pruneforge.evaluate(checkpoint, "greedy")
    assert "\n" not in str(error.value)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_llama(torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruneForgeError):
        pruneforge.evaluate(model, "perplexity", data="python-docs")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
