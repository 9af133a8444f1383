"""Questions that models reason about: what is read as the answer, its scores, the tokens spent, and the sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHECKPOINT, tiny_llama

import pruneforge
from pruneforge import PruneForgeError, Request
from pruneforge.plugins import loaded_plugins
from pruneforge_reasoning.answers import exact_match, extract, f1, normalized, right
from pruneforge_reasoning.sums import ALPHABET, END
from pruneforge_reasoning.train_sums import tokenizer, train

BOXED = (
    "<think>\nOkay, 4 plus 5 is 9. Wait, no: 12.\n</think>\n\nAdding up:\n\n**Final Answer**\n\n\\[\n\\boxed{204}\n\\]"
)


@pytest.mark.parametrize(
    ("kind", "written", "found"),
    [
        ("integer", BOXED, "204"),
        ("integer", "So \\boxed{12} at first, but then \\boxed{\\text{ 033 }}.", "33"),
        ("integer", "The answer is $m + n = 371$.", "371"),
        ("integer", "Thus the final answer is **1,024** apples, since 4 remain.", "1024"),
        ("integer", "3+9=12;12+4=16", "16"),
        ("integer", "It costs 3.50 dollars", ""),
        ("integer", "It is -7.", "-7"),
        ("integer", "1" * 5000, ""),
        ("integer", "\\boxed{x} which means 12", "12"),
        ("integer", "</think>", ""),
        ("integer", "I count 17.</think>I cannot tell.", ""),
        ("letter", "Let me see. He was free (A) then. So the answer is (C).", "C"),
        ("letter", "\\boxed{\\text{B}}", "B"),
        ("letter", "**Answer:** D", "D"),
        ("letter", "Between 6pm and 7pm I saw nothing, A dog. (B)", "B"),
        ("letter", "I saw A dog", ""),
        ("truth", "Therefore, the conclusion is **Uncertain**.", "uncertain"),
        ("truth", "If it were true ... so we get\n\n**Answer: False**", "false"),
        ("truth", "Whether it is true cannot be determined.", "uncertain"),
        ("truth", "The conclusion is not true.", "false"),
        ("truth", "\\boxed{\\text{True}}", "true"),
        ("text", "She was born in Ulm.\n\nFinal answer: **Ulm.**", "Ulm"),
        ("text", "The final answer is: Tim Duncan", "Tim Duncan"),
        ("text", "**Final Answer:**\nthe Danube", "the Danube"),
        ("text", "First ...\nThen ...\n*Lake Constance*\n", "Lake Constance"),
        ("text", "  \n", ""),
    ],
)  # fmt: skip
def test_the_answer_is_found(kind, written, found):
    assert extract(written, kind) == found


def test_what_was_cut_off_is_no_answer_unless_it_is_marked():
    assert extract("3+9=12;12+4=1", "integer", ended=False) == ""
    assert extract("so \\boxed{16}. Let me check: 3", "integer", ended=False) == "16"
    assert extract("Final answer: Ulm\n\nQuestion: who", "text", ended=False) == "Ulm"
    assert extract("Perhaps Ulm", "text", ended=False) == ""


def recorded() -> list[dict[str, str]]:
    return json.loads((Path(__file__).parent / "recorded_answers.json").read_text())


@pytest.mark.parametrize("answer", recorded(), ids=lambda answer: answer["id"])
def test_answers_that_models_gave_are_read_as_people_read_them(answer):
    assert extract(answer["written"], answer["kind"], answer["ended"]) == answer["read"]


def test_scores_of_words_are_squads():
    assert normalized("The  Danube, (a river).") == "danube river"
    assert exact_match("the Danube.", "Danube") == 1
    assert exact_match("Danube river", "Danube") == 0
    assert f1("Danube river", "the Danube") == pytest.approx(2 * 0.5 * 1 / 1.5)  # precision 1/2, recall 1
    assert f1("a b b", "b b c") == pytest.approx(2 / 2.5 * 1)  # articles go: 2 of 2 words, 2 of 3
    assert f1("Rhine", "Danube") == 0
    assert f1("the", "a") == 1  # nothing is left of either


def test_numbers_are_right_by_value_and_nothing_is_never_right():
    assert right("33", ("033",), "integer") == 1
    assert right("34", ("033", "34"), "integer") == 1
    assert right("", ("0",), "integer") == 0
    assert right("", ("the",), "text") == 0
    assert right("ulm", ("Ulm", "Ulm, Germany"), "text") == 1


def source(name, **options):
    return loaded_plugins().registry.create("source", name, options)


def test_sums_add_up_and_their_answers_show_each_step():
    questions = source("sums", steps=[1, 4], count=50).questions()
    assert len({question.id for question in questions}) == 100
    for question in questions:
        summands = [int(part) for part in question.text.removesuffix("=").split("+")]
        assert len(summands) == int(question.difficulty.split()[0]) + 1
        assert question.answers == (str(sum(summands)),)
    for document in source("sums").documents("calibration")[:200]:
        asked, _, said = document.removesuffix(END).partition("=")
        total = 0
        for number, summand in enumerate(map(int, asked.split("+"))):
            step = said.split(";")[number - 1]
            assert number == 0 or step == f"{total}+{summand}={total + summand}"
            total += summand
        assert extract(said, "integer") == str(total)
    assert source("sums", seed=1).questions() != source("sums").questions()


def test_no_question_of_several_steps_is_among_the_worked_examples():
    questions = {question.text for question in source("sums", steps=[3, 6]).questions()}
    worked = [document.partition("=")[0] + "=" for document in source("sums").documents("calibration")]
    assert len([text for text in worked if text in questions]) < 10  # of 4,096: three-step sums are 10,000
    assert not [text for text in worked if text in questions and text.count("+") == 6]


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    """A folder of a tiny LLaMA with the characters of sums, hardly trained."""
    folder = tmp_path_factory.mktemp("adder") / "model"
    train(folder, steps=3, batch=4, seed=0)
    return folder


def test_characters_are_tokens():
    characters = tokenizer()
    text = "3+9=12;12+4=16"
    ids = characters(text + END)["input_ids"]
    assert len(ids) == len(text) + 1
    assert characters.decode(ids, skip_special_tokens=True) == text
    assert len(set(characters(ALPHABET)["input_ids"])) == len(ALPHABET)


def greedy(model, ids, ends, longest):
    """Write token by token, without a cache, padding or batches."""
    written = []
    while len(written) < longest and (not written or written[-1] not in ends):
        logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1]
        written.append(int(logits.argmax()))
    return written


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_what_is_written_is_the_likeliest_token_by_token(adder, batch_size):
    model = transformers.AutoModelForCausalLM.from_pretrained(adder).double().eval()
    # Logits that favour the end now and then: some answers end, others do not.
    model.lm_head.weight.data[0] = model.lm_head.weight.data[5] * 1.02
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=2.0)
    asked = {"data": "sums", "source_options": {"count": 5, "steps": [1, 3]}, "max_new_tokens": 12}
    results = pruneforge.evaluate(
        model, "reasoning", items=True, processor=tokenizer(), batch_size=batch_size, dtype="float64", **asked
    )
    questions = source("sums", count=5, steps=[1, 3]).questions()
    expected = []
    with torch.no_grad():
        for question in questions:
            expected.append(greedy(model, tokenizer()(question.text)["input_ids"], [0], 12))
    items = results["items"]
    assert items["tokens"] == [len(tokens) for tokens in expected]
    assert items["unfinished"] == [int(tokens[-1] != 0) for tokens in expected]
    assert items["written"] == [tokenizer().decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert results["tokens"] == pytest.approx(sum(map(len, expected)) / 10)
    assert results["by_difficulty"]["1 step"]["questions"] == 5
    assert results["by_difficulty"]["3 steps"]["tokens"] == pytest.approx(sum(map(len, expected[5:])) / 5)
    assert results["unfinished"] == sum(items["unfinished"])
    assert model.generation_config.repetition_penalty == 3.0


def test_a_model_that_ends_at_once_has_answered_nothing():
    model = tiny_llama(vocab_size=len(tokenizer()), max_position_embeddings=64)
    model.lm_head.weight.data.zero_()  # all are as likely: the first token, which is the end
    results = pruneforge.evaluate(
        model, "reasoning", data="sums", source_options={"count": 3}, processor=tokenizer(), items=True
    )
    assert results["accuracy"] == 0
    assert results["unfinished"] == 0
    assert results["tokens"] == 1
    assert results["items"]["answer"] == [""] * 9


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"question": "What is the capital of France?", "answer": ["Paris", "Paris, France"], "difficulty": 1, "id": "fr"},
    {"question": "And of Spain?", "answer": "Madrid", "difficulty": 2},
]


def test_questions_of_a_file_are_asked_by_its_prompt_and_template(tmp_path):
    path = lines(tmp_path / "q.jsonl", ROWS)
    questions = source(f"questions:{path}", prompt="Q: {question} A:").questions()
    assert [(q.id, q.text, q.difficulty) for q in questions] == [
        ("fr", "Q: What is the capital of France? A:", "1"),
        ("2", "Q: And of Spain? A:", "2"),
    ]
    assert questions[0].answers == ("Paris", "Paris, France")
    loaded = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    loaded.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<think>\n"
    evaluator = loaded_plugins().registry.create("evaluator", "reasoning", {"data": "x", "opening": "<think>\n"})
    assert loaded.decode(evaluator._prompt(loaded, questions[1])) == "<user>Q: And of Spain? A:</user><think>"
    loaded.chat_template = None
    assert loaded.decode(evaluator._prompt(loaded, questions[1])) == "Q: And of Spain? A:<think>\n"


def test_answers_in_words_have_exact_match_and_f1(tmp_path):
    path = lines(tmp_path / "q.jsonl", ROWS)
    results = pruneforge.evaluate(CHECKPOINT, "reasoning", data=f"questions:{path}", max_new_tokens=4)
    assert results["accuracy"] == results["exact_match"] <= results["f1"]
    assert results["by_difficulty"].keys() == {"1", "2"}
    assert results["max_new_tokens"] == 4
    assert any("did not end within 4 tokens" in line for line in results["warnings"])


HUB = {
    "aime-2024": (
        "train",
        {"ID": "2024-II-7", "Problem": "Let N be ...", "Solution": "...", "Answer": 699},
        ("2024-II-7", ("699",), "problems 6 to 10"),
    ),
    "folio": (
        "validation",
        {
            "story_id": 1,
            "premises": "All birds fly.\nTweety is a bird.",
            "conclusion": "Tweety flies.",
            "label": "Uncertain",
        },
        ("0", ("uncertain",), "up to 5 premises"),
    ),
    "temporal-sequences": ("test", {"input": "Today, ...\n(A) 1pm (B) 2pm", "target": "(B)"}, ("0", ("B",), "all")),
    "musique": (
        "validation",
        {
            "id": "3hop1__1_2_3",
            "question": "Who ...?",
            "answer": "Tim Duncan",
            "answer_aliases": ["Timothy Duncan", "Tim Duncan"],
            "paragraphs": [{"idx": 0, "title": "x", "paragraph_text": "y"}],
        },
        ("3hop1__1_2_3", ("Tim Duncan", "Timothy Duncan"), "3 hops"),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_pinned_questions_are_read_through_datasets(name, tmp_path, monkeypatch):
    """The pinned location is swapped for a local folder of the same layout; everything else is real."""
    split, row, expected = HUB[name]
    lines(tmp_path / f"{split}.jsonl", [row, row])
    pinned = source(name).location()
    assert "/" in pinned["path"]
    assert pinned["split"] == split
    chosen = source(name, path=str(tmp_path))
    monkeypatch.setattr(type(chosen), "config", None)
    question, _ = chosen.questions()
    assert (question.id, question.answers, question.difficulty) == expected
    words = [value for key, value in row.items() if key in ("Problem", "premises", "conclusion", "input", "question")]
    assert words
    assert all(word in question.text for word in words)
    assert right(question.answers[0], question.answers, question.kind) == 1
    request = Request(tokenizer(), 2, 8, 1, 0)
    with pytest.raises(PruneForgeError, match="evaluation alone"):
        list(chosen.calibration(request))
    broken = {**row, **{key: None for key in ("ID", "label", "target", "id") if key in row}}
    lines(tmp_path / f"{split}.jsonl", [row, broken])
    with pytest.raises(PruneForgeError, match=r"row 1 of source .* is no question as expected") as error:
        chosen.questions()
    assert "\n" not in str(error.value)
    lines(tmp_path / f"{split}.jsonl", [{"other": 1}])
    with pytest.raises(PruneForgeError, match="has no column"):
        chosen.questions()


@pytest.mark.parametrize(
    ("line", "options", "said"),
    [
        ("{", {}, "line 1 of .* is not a JSON object with `question` and `answer`"),
        ("[1]", {}, "is not a JSON object"),
        ('{"question": "q"}', {}, "is not a JSON object"),
        ('{"question": "q", "answer": null}', {}, "is not a JSON object"),
        ('{"question": "q", "answer": []}', {}, "is not a JSON object"),
        ('{"question": " ", "answer": 1}', {}, "is not a JSON object"),
        ('{"question": "q", "answer": "x"}', {"kind": "integer"}, "which is no whole number"),
        ('{"question": "q", "answer": "1", "id": 2}\n{"question": "q", "answer": "1"}', {}, "have the id '2'"),
        ("", {}, "holds no question"),
        ('{"question": "q", "answer": 1}', {"kind": "number"}, "kind"),
    ],
)
def test_files_that_hold_no_questions_are_one_line(tmp_path, line, options, said):
    path = tmp_path / "q.jsonl"
    path.write_text(line)
    with pytest.raises(PruneForgeError, match=said) as error:
        pruneforge.evaluate(CHECKPOINT, "reasoning", data=f"questions:{path}", source_options=options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("text", {"data": "python-docs"}, "source 'python-docs' gives no questions"),
        ("image", {"data": "sums"}, "reasoning is of models that write text"),
        ("text", {"data": "questions:nowhere.jsonl"}, "file of questions 'nowhere.jsonl' does not exist"),
        ("text", {"data": "sums", "limit": 0}, "limit"),
        ("text", {"data": "sums", "max_new_tokens": 0}, "max_new_tokens"),
        ("text", {"data": "sums", "source_options": {"steps": [400]}}, "fills the model's context of 256 tokens"),
        ("text", {"data": "sums", "source_options": {"steps": []}}, "steps"),
        ("text", {"data": "sums", "source_options": {"steps": [0]}}, "steps"),
        ("text", {"data": "musique"}, "source 'musique' cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(model, options, said):
    with pytest.raises(PruneForgeError, match=said) as error:
        pruneforge.evaluate(f"demo:{model}", "reasoning", **options)
    assert "\n" not in str(error.value)


def test_answers_are_shortened_to_the_context_and_it_is_said(adder):
    results = pruneforge.evaluate(
        adder, "reasoning", data="sums", max_new_tokens=500, limit=2, source_options={"steps": [1]}
    )
    assert results["max_new_tokens"] == 160 - len("3+4=")
    assert any("answers may have 156 tokens, not 500" in line for line in results["warnings"])
