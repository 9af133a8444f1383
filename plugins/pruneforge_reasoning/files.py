"""Questions from a file of JSON Lines."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge.documents import parse_json, read_text
from pruneforge_reasoning.answers import KINDS, Kind
from pruneforge_reasoning.questions import Question, QuestionSource, check_distinct, truth


class QuestionFile(QuestionSource):
    """Questions of a file: each line is a JSON object with `question` and `answer`, and maybe `difficulty` and `id`.

    `answer` is a text or number, or a list of those that are right.
    """

    argument = "path"

    class Options(TextSource.Options):
        """Options of a file of questions."""

        path: str = Field(description="the file, JSON Lines")
        kind: Kind = Field("text", description="what answers are: integer, letter, truth or text")
        prompt: str = Field("{question}", description="what the model is told; {question} stands for the question")

    options: Options

    def questions(self) -> Sequence[Question]:
        """Return the questions of the file.

        Raises:
            PruneForgeError: It cannot be read, a line is no question, or two have the same `id`.
        """
        if "{question}" not in self.options.prompt:
            raise PruneForgeError(
                f"the prompt {self.options.prompt!r} has no {{question}}, so that all are asked the same"
            )
        path = self.options.path
        lines = read_text(Path(path), "file of questions").split("\n")
        try:
            found = [self._question(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        except ValueError as error:
            raise PruneForgeError(f"{path!r} holds no questions as expected: {error}") from error
        check_distinct(found, repr(path))
        return found

    def _question(self, number: int, line: str) -> Question:
        """Return the question of a line.

        Raises:
            ValueError: It is none.
        """
        kind = self.options.kind
        try:
            row = parse_json(line, "line")
            text, given = row["question"], row["answer"]
            name, difficulty = (str(row.get(key, usual)) for key, usual in (("id", number), ("difficulty", "all")))
        except (PruneForgeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"line {number} is no JSON object with `question` and `answer`") from None
        try:
            answers = tuple(_answer(each, kind) for each in (given if isinstance(given, list) else [given]))
            asked = self.options.prompt.replace("{question}", text) if isinstance(text, str) and text.strip() else ""
            return Question(name, asked, answers, kind, difficulty)
        except ValueError as error:
            raise ValueError(f"line {number}: {error} (`source_options` kind={'|'.join(KINDS)})") from error

    def describe(self, part: Part) -> dict[str, Any]:
        """Return the name and hash of the file."""
        path = Path(self.options.path)
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _answer(given: Any, kind: Kind) -> str:
    """Return an answer as `extract` spells it.

    Raises:
        ValueError: It is neither text nor number.
    """
    if (isinstance(given, bool) and kind != "truth") or not isinstance(given, str | int | float):
        raise ValueError(f"the answer {given!r} is neither text nor number")
    text = str(given).strip()
    if kind == "truth":
        return truth(text)
    return text.strip("()").upper() if kind == "letter" else text
