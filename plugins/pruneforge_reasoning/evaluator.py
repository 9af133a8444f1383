"""How a model answers questions that it has to think about, and how long it thinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Evaluator, PruneForgeError, Subject
from pruneforge_reasoning.answers import THOUGHT, extract
from pruneforge_reasoning.generation import Written, generate
from pruneforge_reasoning.questions import Question, QuestionSource
from pruneforge_reasoning.scores import best, f1, right

LONGEST = 32768
"""Tokens that an answer may have where the model's context holds as many: the limit of the published evaluations."""


class Reasoning(Evaluator):
    """Accuracy of answers that a model reasons its way to, and the tokens spent, by difficulty.

    After Zhang et al., When Reasoning Meets Compression (2025), whose code has no scorer. The model is asked each
    question by its tokenizer's chat template and goes on with the likeliest token until it ends. What it answers is
    read as `pruneforge_reasoning.answers.extract` says. An answer that does not end within `max_new_tokens` counts only
    if it is marked as the answer, and the unfinished ones are counted. The prompts are not the paper's, word by word:
    compare models asked the same, not with its table.
    """

    measure = "accuracy"
    higher_is_better = True
    share = True

    class Options(Evaluator.Options):
        """Options of the reasoning evaluator."""

        data: str = Field(description="source of questions, such as aime-2024, or questions:FILE")
        limit: int | None = Field(None, ge=1, description="only the first so many questions")
        max_new_tokens: int | None = Field(
            None, ge=1, description=f"tokens an answer may have; by default what the context holds, at most {LONGEST}"
        )
        chat_template: bool = Field(True, description="ask by the tokenizer's chat template, if it has one")
        opening: str = Field("", description="text that each answer begins with, such as <think>")
        source_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return accuracy and mean tokens an answer, over all and by difficulty.

        Questions that are answered in words have two entries more, `exact_match`, which is their accuracy, and `f1`, as
        in SQuAD. Items are the questions, with all of this, what the model wrote, and the answer found in it.
        """
        asked = self.options
        source = subject.source(asked.data, asked.source_options)
        if not isinstance(source, QuestionSource):
            raise PruneForgeError(
                f"source {source.name!r} gives no questions; some that do are aime-2024, sums and questions:FILE"
            )
        _check_writes(subject)
        all_questions, described = source.questions(), source.describe("evaluation")
        questions = all_questions[: asked.limit]
        if not questions:
            raise PruneForgeError(f"source {source.name!r} holds no question")
        texts = [self._prompt(subject.model.processor, question) for question in questions]
        prompts = [_tokens(subject, text, not self._in_chat(subject.model.processor)) for text in texts]
        longest, warnings = self._longest(subject, prompts)
        written = generate(subject, prompts, longest)
        begun = [self.options.opening or (THOUGHT if text.rstrip().endswith(THOUGHT) else "") for text in texts]
        records = [_record(*row) for row in zip(questions, begun, written, strict=True)]
        if len(questions) < len(all_questions):
            warnings.append(f"only the first {len(questions)} of {len(all_questions)} questions were asked")
        unfinished = sum(record["unfinished"] for record in records)
        if unfinished:
            warnings.append(f"{unfinished} of {len(records)} answers did not end within {longest} tokens")
        difficulties = dict.fromkeys(question.difficulty for question in questions)
        return {
            **_summary(records),
            "by_difficulty": {
                name: _summary([record for record in records if record["difficulty"] == name]) for name in difficulties
            },
            "data": {"source": asked.data, **described},
            "max_new_tokens": longest,
            "warnings": warnings,
            **({"items": {name: [record[name] for record in records] for name in records[0]}} if subject.items else {}),
        }

    def _in_chat(self, tokenizer: Any) -> bool:
        return self.options.chat_template and bool(getattr(tokenizer, "chat_template", None))

    def _prompt(self, tokenizer: Any, question: Question) -> str:
        """Return what the model is asked, and what its answer begins with."""
        text = question.text
        if self._in_chat(tokenizer):
            message = [{"role": "user", "content": question.text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if not text.rstrip().endswith(self.options.opening.rstrip()):  # templates of such models may have it
            text += self.options.opening
        return text

    def _longest(self, subject: Subject, prompts: Sequence[Tensor]) -> tuple[int, list[str]]:
        """Return how many tokens an answer may have, and warnings if that is less than was asked for.

        Raises:
            PruneForgeError: A question alone fills the context.
        """
        context = subject.model.adapter.context_length(subject.model.module)
        wanted = self.options.max_new_tokens
        if context is None:
            return wanted or LONGEST, []
        room = context - max(len(prompt) for prompt in prompts)
        if room < 1:
            raise PruneForgeError(
                f"a question of {context - room} tokens fills the model's context of {context} tokens"
            )
        if wanted is None or wanted <= room:
            return min(wanted or LONGEST, room), []
        return room, [f"answers may have {room} tokens, not {wanted}, since the context is {context} tokens"]


def _check_writes(subject: Subject) -> None:
    """Check that the model writes text.

    Raises:
        PruneForgeError: It does not, or came without a tokenizer.
    """
    module, tokenizer = subject.model.module, subject.model.processor
    can_generate = getattr(module, "can_generate", None)
    if can_generate is None or not can_generate():
        raise PruneForgeError(f"reasoning is of models that write text, and {type(module).__name__} does not")
    if not callable(tokenizer):
        raise PruneForgeError("the model came without a tokenizer, which questions need; pass processor=")


def _tokens(subject: Subject, text: str, special: bool) -> Tensor:
    """Return the token ids of a prompt, int64 [tokens].

    Raises:
        PruneForgeError: The model has no such tokens, or not as many places.
    """
    model = subject.model
    ids = model.processor(text, add_special_tokens=special, verbose=False)["input_ids"]  # a chat template has its own
    prompt = torch.tensor(ids, dtype=torch.int64)
    model.adapter.batch(prompt[None], model.module)
    return prompt


def _record(question: Question, begun: str, written: Written) -> dict[str, Any]:
    found = extract(begun + written.text, question.kind, written.ended)
    in_words = question.kind == "text"
    return {
        "id": question.id,
        "difficulty": question.difficulty,
        "accuracy": right(found, question.answers, question.kind),
        **({"f1": best(f1, found, question.answers)} if in_words else {}),
        "tokens": written.tokens,
        "unfinished": int(not written.ended),
        "answer": found,
        "written": written.text,
    }


def _summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracy = fmean(record["accuracy"] for record in records)
    in_words = {"exact_match": accuracy, "f1": fmean(r["f1"] for r in records)} if "f1" in records[0] else {}
    return {
        "accuracy": accuracy,
        **in_words,
        "tokens": fmean(record["tokens"] for record in records),
        "unfinished": sum(record["unfinished"] for record in records),
        "questions": len(records),
    }
