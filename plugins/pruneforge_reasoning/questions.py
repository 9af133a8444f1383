"""Questions, as a source gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge_reasoning.answers import Kind


@dataclass(frozen=True)
class Question:
    """A question with its right answers.

    Attributes:
        id: What no other question of the source is called.
        text: The question, with all that the model is told.
        answers: Each of them is right.
        kind: What the answer is.
        difficulty: What questions as difficult as this one have in common.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    kind: Kind
    difficulty: str


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

    def describe(self, part: Part) -> dict[str, Any]:
        """Return what identifies the questions."""
        return {}
