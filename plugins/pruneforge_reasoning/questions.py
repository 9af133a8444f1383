"""Questions, as a source gives them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge_reasoning.answers import Kind

_SHAPES: Mapping[Kind, re.Pattern[str]] = {
    "integer": re.compile(r"-?[0-9]{1,18}"),
    "letter": re.compile(r"[A-Z]"),
    "truth": re.compile(r"true|false|uncertain"),
    "text": re.compile(r"(?s).+"),
}
"""What answers of each kind look like."""


@dataclass(frozen=True)
class Question:
    """A question with its right answers.

    Attributes:
        id: What no other question of the source is called.
        text: The question, with all that the model is told.
        answers: Each of them is right.
        kind: What the answer is.
        difficulty: What questions as difficult as this one have in common.

    Raises:
        ValueError: The text or an answer is empty, or an answer is not of its kind.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    kind: Kind
    difficulty: str

    def __post_init__(self) -> None:
        if not (isinstance(self.text, str) and self.text.strip()):
            raise ValueError("the question is no text")
        if not self.answers or not all(isinstance(answer, str) and answer.strip() for answer in self.answers):
            raise ValueError("the answer is no text")
        wrong = next((answer for answer in self.answers if not _SHAPES[self.kind].fullmatch(answer)), None)
        if wrong is not None:
            raise ValueError(f"the answer {wrong!r} is not of kind {self.kind!r}")


def check_distinct(questions: Sequence[Question], place: str) -> None:
    """Check that no two questions of a place have the same id.

    Raises:
        PruneForgeError: Two have.
    """
    for name, count in Counter(question.id for question in questions).most_common(1):
        if count > 1:
            raise PruneForgeError(f"{place}: {count} questions have the id {name!r}")


def truth(label: str) -> str:
    """Return a label in one spelling.

    Raises:
        ValueError: It is none of the three.
    """
    known = {"true": "true", "false": "false", "uncertain": "uncertain", "unknown": "uncertain"}
    try:
        return known[label.strip().lower()]
    except KeyError:
        raise ValueError(f"label {label!r} is neither true, false nor uncertain") from None


class QuestionSource(TextSource):
    """A source of questions to evaluate on; where it has others, or none that leak, also of calibration text."""

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """Return the questions, in an order that does not vary.

        Raises:
            PruneForgeError: They cannot be loaded.
        """

    def documents(self, part: Part) -> Sequence[str]:
        """Return the questions as documents for evaluation.

        Raises:
            PruneForgeError: They are asked for as calibration data, which would leak what is evaluated on.
        """
        if part == "calibration":
            raise PruneForgeError(
                f"source {self.name!r} has questions for evaluation alone; calibrate on another text, such as c4"
            )
        return [question.text for question in self.questions()]
