"""Questions from a file of JSON Lines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge.documents import parse_json, read_text
from pruneforge_reasoning.answers import KINDS, Kind
from pruneforge_reasoning.questions import Question, QuestionSource

_INTEGER = re.compile(r"-?[0-9]{1,18}")


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
        path = self.options.path
        lines = read_text(Path(path), "file of questions").split("\n")
        found = [self._question(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        names = [question.id for question in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PruneForgeError(f"two questions of {path!r} have the id {twice!r}")
        return found

    def _question(self, number: int, line: str) -> Question:
        path = self.options.path
        try:
            row = parse_json(line, "line")
            text, answer = row["question"], row["answer"]
            name, difficulty = str(row.get("id", number)), str(row.get("difficulty", "all"))
        except (PruneForgeError, KeyError, TypeError, AttributeError):
            text, answer, name, difficulty = None, None, "", ""
        answers = tuple(str(each).strip() for each in (answer if isinstance(answer, list) else [answer]))
        if not (isinstance(text, str) and text.strip() and answers and all(answers)) or answer is None:
            raise PruneForgeError(f"line {number} of {path!r} is not a JSON object with `question` and `answer`")
        if self.options.kind == "integer" and not all(_INTEGER.fullmatch(each) for each in answers):
            raise PruneForgeError(
                f"line {number} of {path!r} has the answer {answers[0]!r}, which is no whole number; other kinds of "
                f"answers are {', '.join(kind for kind in KINDS if kind != 'integer')}: `source_options` kind=KIND"
            )
        return Question(name, self.options.prompt.replace("{question}", text), answers, self.options.kind, difficulty)

    def describe(self, part: Part) -> dict[str, Any]:
        """Return the name and hash of the file."""
        path = Path(self.options.path)
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
