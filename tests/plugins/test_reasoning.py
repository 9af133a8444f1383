"""Questions that models reason about: what is read as the answer, its scores, the tokens spent, and the sources."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHECKPOINT, tiny_llama

import pruneforge
from pruneforge import PruneForgeError, Request
from pruneforge.plugins import loaded_plugins
from pruneforge_reasoning.answers import extract
from pruneforge_reasoning.scores import exact_match, f1, normalized, right
from pruneforge_reasoning.sums import ALPHABET, END, worked
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
        ("letter", "It is the third.\n\n**C**\n", "C"),
        ("integer", "\\boxed{113.0}", "113"),
        ("integer", "\\boxed{12} and \\boxed{", "12"),
        ("integer", "\\boxed{" * 50_000, ""),
        ("truth", "It can't be determined", "uncertain"),
        ("text", "The answer is known. Final answer: Ulm", "Ulm"),
        ("text", "<answer>Paris</answer>", "Paris"),
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
        ('letter', 'C', 'C'),
        ('letter', '**C**', 'C'),
        ('letter', 'B) 5pm to 7pm', 'B'),
        ('letter', '**B. 5pm to 7pm**', 'B'),
        ('letter', 'The correct choice is **C**.', 'C'),
        ('letter', 'so which is option C.', 'C'),
        ('letter', '### Final Answer\n\nB', 'B'),
        ('letter', 'The letter is **C**', 'C'),
        ('letter', 'Answer: I think (C)', 'C'),
        ('letter', 'The answer: A person was seen there (B)', 'B'),
        ('letter', 'The answer is not (A) but (B)', 'B'),
        ('letter', 'Final answer: (a)', 'A'),
        ('letter', 'The correct answer is option (C) 11am to 12pm.', 'C'),
        ('letter', '**(D)**', 'D'),
        ('letter', 'Answer: (A) 1pm to 2pm', 'A'),
        ('letter', '\\boxed{C}', 'C'),
        ('letter', '\\boxed{(C)}', 'C'),
        ('letter', 'The answer is C', 'C'),
        ('truth', 'The conclusion is uncertain because the premises do not prove it true or false.', 'uncertain'),
        ('truth', 'So the conclusion is uncertain (neither true nor false).', 'uncertain'),
        ('truth', 'The answer is neither true nor false; Uncertain', 'uncertain'),
        ('truth', 'We cannot determine whether the conclusion is true or false.', 'uncertain'),
        ('truth', 'The answer is that it is not known whether it is true. Uncertain', 'uncertain'),
        ('truth', 'The answer is that the conclusion is not proven true, i.e. Uncertain.', 'uncertain'),
        ('truth', 'The answer: not definitively true or false → uncertain', 'uncertain'),
        ('truth', "It isn't true.", 'false'),
        ('truth', "The conclusion can't be true.", 'false'),
        ('truth', 'Indeterminate', 'uncertain'),
        ('truth', 'undetermined', 'uncertain'),
        ('truth', 'The conclusion is not entirely true, as a trout is a fish.', 'false'),
        ('truth', 'We need to answer whether it is true, false or uncertain.\n\nso. Hence false.', 'false'),
        ('truth', '**Final Answer:** Uncertain', 'uncertain'),
        ('truth', '\\boxed{\\text{Uncertain}}', 'uncertain'),
        ('truth', 'Answer: False', 'false'),
        ('truth', 'the answer is false, because it is true that', 'false'),
        ('text', '**Final answer:** Paris \n\n**Explanation:** The answer is based on general knowledge.', 'Paris'),
        ('text', 'Final answer: Paris\n(Note: the answer is my best guess.)', 'Paris'),
        ('text', 'Final answer: Ulm\n\nQuestion: Who wrote X?\nFinal answer: Bach', 'Ulm'),
        ('integer', 'Final answer: 204\n\nLet me double check the answer: with n = 12, we get 204.', '204'),
        ('integer', '**Final answer: 204**\n\nNote: this answer is consistent with the 30 cases.', '204'),
        ('integer', 'To answer the question: what is 2+2? Let me see. Therefore 5', '5'),
        ('integer', 'The answer is 70 (when n = 3).', '70'),
        ('integer', '**Answer: 7** where x=2', '7'),
        ('integer', 'The answer is 25, as 5^2=25 and 2=2.', '25'),
        ('integer', '\\boxed{1{,}024}', '1024'),
        ('integer', '\\boxed{1\\,024}', '1024'),
        ('integer', 'The answer is −5', '-5'),
        ('integer', '\\boxed{809.0}', '809'),
        ('integer', 'The answer is 1,024.00.', '1024'),
        ('integer', 'The answer is $2^{10} = 1024$', '1024'),
        ('integer', '\\boxed{33^\\circ}', '33'),
        ('integer', '\n</think>\n\nThe answer is \\boxed{5}\n</think>', '5'),
        ('integer', 'The answer is 7.\n\nI hope it is correct.', '7'),
        ('text', '**Final answer:**  \nParis', 'Paris'),
        ('text', 'Final answer: \\boxed{Paris}', 'Paris'),
        ('text', 'Final answer: "Paris"', 'Paris'),
        ('text', 'Final Answer\n\nParis', 'Paris'),
        ('text', 'Final answer:\n\n**Paris**', 'Paris'),
        ('text', 'The answer is known. Final answer: U.S.', 'U.S'),
        ('text', '\\boxed{\\text{Paris}}', 'Paris'),
        ('text', 'Question: who?\nFinal answer: me', 'me'),
        ('integer', 'So there are 3 x 4 = 12 ways. Answer: $2^{10} = 1024$', '1024'),
        ('integer', 'The answer is approximately 3.5', ''),
        ('integer', '**Final Answer:** $540$', '540'),
    ],
)  # fmt: skip
def test_the_answer_is_found(kind, written, found):
    assert extract(written, kind) == found


def test_what_was_cut_off_is_no_answer_unless_it_is_marked():
    assert extract("<think>\nSo the answer is 12? Wait, maybe not.", "integer", ended=False) == ""
    assert extract("<think>\nSo the answer is 12? Wait.</think> The answer is 13", "integer", ended=False) == "13"
    assert extract("3+9=12;12+4=1", "integer", ended=False) == ""
    assert extract("so \\boxed{16}. Let me check: 3", "integer", ended=False) == "16"
    assert extract("Final answer: Ulm\n\nQuestion: who", "text", ended=False) == "Ulm"
    assert extract("Perhaps Ulm", "text", ended=False) == ""


def recorded() -> list[dict[str, str]]:
    return json.loads((Path(__file__).parent / "recorded_answers.json").read_text())


@pytest.mark.parametrize("answer", recorded(), ids=lambda answer: answer["id"])
def test_answers_that_a_model_gave_are_read(answer):
    """By SmolLM2-135M-Instruct. In words it did not mark its answer, so that the whole line is read."""
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


def test_what_is_asked_is_asked_once_and_never_shown_but_for_sums_of_one_step():
    asked = source("sums", steps=[1, 2, 3, 6], count=200).questions()
    texts = {question.text for question in asked}
    assert len(texts) == len(asked)
    counts = {steps: sum(text.count("+") == steps for text in texts) for steps in (1, 2, 3, 6)}
    assert counts[1] == 100
    assert 50 < counts[2] < 150  # a tenth of a thousand
    assert counts[3] == counts[6] == 200
    shown = {document.partition("=")[0] + "=" for document in source("sums").documents("calibration")}
    shown |= {text for text, _ in worked(random.Random(0), 20_000)}
    assert {text.count("+") for text in texts & shown} == {1}
    assert {text.count("+") for text in shown} == {1, 2, 3, 4, 5, 6}


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
def test_what_is_written_is_the_likeliest_token_by_token(batch_size):
    model = tiny_llama(vocab_size=len(tokenizer()), max_position_embeddings=64)
    model.generation_config.update(
        eos_token_id=[0, 9],
        repetition_penalty=3.0,
        do_sample=True,
        temperature=2.0,
        suppress_tokens=[3, 4, 5],
        num_return_sequences=2,
    )
    asked = {"data": "sums", "source_options": {"count": 5, "steps": [1, 3]}, "max_new_tokens": 12}
    results = pruneforge.evaluate(
        model, "reasoning", items=True, processor=tokenizer(), batch_size=batch_size, dtype="float64", **asked
    )
    questions = source("sums", count=5, steps=[1, 3]).questions()
    expected = []
    with torch.no_grad():
        for question in questions:
            expected.append(greedy(model, tokenizer()(question.text)["input_ids"], [0, 9], 12))
    items = results["items"]
    assert items["tokens"] == [len(tokens) for tokens in expected]
    assert items["unfinished"] == [int(tokens[-1] not in (0, 9)) for tokens in expected]
    assert items["written"] == [tokenizer().decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert results["tokens"] == pytest.approx(sum(map(len, expected)) / 10)
    assert results["by_difficulty"]["1 step"]["questions"] == 5
    assert results["by_difficulty"]["3 steps"]["tokens"] == pytest.approx(sum(map(len, expected[5:])) / 5)
    assert 0 < results["unfinished"] == sum(items["unfinished"]) < 10
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
    assert evaluator._prompt(loaded, questions[1]) == "<user>Q: And of Spain? A:</user><think>"
    loaded.chat_template = None
    assert evaluator._prompt(loaded, questions[1]) == "Q: And of Spain? A:<think>\n"


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
def test_pinned_questions_are_read_through_datasets(name, tmp_path):
    """A local folder of the same layout stands for the pinned place; everything else is real."""
    split, row, expected = HUB[name]
    lines(tmp_path / f"{split}.jsonl", [row])
    pinned = source(name).location()
    assert "/" in pinned["path"]
    assert pinned["split"] == split
    chosen = source(name, path=str(tmp_path))
    (question,) = chosen.questions()
    assert (question.id, question.answers, question.difficulty) == expected
    words = [value for key, value in row.items() if key in ("Problem", "premises", "conclusion", "input", "question")]
    assert words
    assert all(word in question.text for word in words)
    assert right(question.answers[0], question.answers, question.kind) == 1
    request = Request(tokenizer(), 2, 8, 1, 0)
    with pytest.raises(PruneForgeError, match="evaluation alone"):
        list(chosen.calibration(request))
    for column in chosen.columns:
        lines(tmp_path / f"{split}.jsonl", [row, {**row, column: None}])
        with pytest.raises(PruneForgeError, match=r"row 1 of source .* is no question as expected") as error:
            chosen.questions()
        assert "\n" not in str(error.value)
    if name in ("aime-2024", "musique"):
        lines(tmp_path / f"{split}.jsonl", [row, row])
        with pytest.raises(PruneForgeError, match="2 questions have the id"):
            chosen.questions()
    lines(tmp_path / f"{split}.jsonl", [{"other": 1}])
    with pytest.raises(PruneForgeError, match="has no column"):
        chosen.questions()


@pytest.mark.parametrize(
    ("line", "options", "said"),
    [
        ("{", {}, "line 1 is no JSON object with `question` and `answer`"),
        ("[1]", {}, "line 1 is no JSON object with `question` and `answer`"),
        ('{"question": "q"}', {}, "line 1 is no JSON object with `question` and `answer`"),
        ('{"question": "q", "answer": null}', {}, "line 1: the answer None is neither text nor number"),
        ('{"question": "q", "answer": []}', {}, "line 1: the answer is no text"),
        ('{"question": " ", "answer": 1}', {}, "line 1: the question is no text"),
        ('{"question": "q", "answer": "x"}', {"kind": "integer"}, "the answer 'x' is not of kind 'integer'"),
        (
            '{"question": "q", "answer": "1", "id": 2}\n{"question": "q", "answer": "1"}',
            {},
            "2 questions have the id '2'",
        ),
        ('{"question": "q", "answer": ["a", null]}', {}, "the answer None is neither text nor number"),
        ('{"question": "q", "answer": [["a"]]}', {}, "neither text nor number"),
        ('{"question": "q", "answer": "b) 5pm"}', {"kind": "letter"}, "is not of kind 'letter'"),
        ('{"question": "q", "answer": "perhaps"}', {"kind": "truth"}, "neither true, false nor uncertain"),
        ('{"question": "q", "answer": "a"}', {"prompt": "Answer briefly."}, "has no {question}"),
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
        ("text", {"data": "sums", "source_options": {"steps": [400]}}, "802 tokens long, and the model's context"),
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
