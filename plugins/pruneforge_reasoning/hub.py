"""The four sets of questions of Zhang et al., When Reasoning Meets Compression (2025), from the Hub."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from pruneforge import PruneForgeError, TextSource
from pruneforge.data.text import Part
from pruneforge_reasoning.answers import Kind
from pruneforge_reasoning.questions import Question, QuestionSource, check_distinct, truth
from pruneforge_text.hub import load_rows


class _HubQuestions(QuestionSource):
    """Questions of a Hub data set; a subclass says where it is, and how a row becomes a question.

    Attributes:
        path: Its name on the Hub.
        config: Its configuration, if it has several.
        split: The split that is asked.
        columns: The columns that are read.
        kind: What answers are.
    """

    path: ClassVar[str]
    config: ClassVar[str | None] = None
    split: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    kind: ClassVar[Kind]

    class Options(TextSource.Options):
        """Options of questions from the Hub."""

        path: str | None = Field(None, description="another place of the same data: OWNER/NAME, or a local folder")
        revision: str | None = Field(None, description="branch, tag or commit of the data set")

    options: Options

    def location(self) -> dict[str, Any]:
        """Return the arguments of `datasets.load_dataset`."""
        path = self.options.path or self.path
        config = None if Path(path).is_dir() else self.config  # a folder holds one set
        return {"path": path, "name": config, "split": self.split, "revision": self.options.revision}

    def questions(self) -> Sequence[Question]:
        """Download the questions, or read them from the cache.

        Raises:
            PruneForgeError: They cannot be loaded, or are not in the columns that they should be in.
        """
        rows = load_rows(self.name, self.location(), self.columns)
        found = []
        for number, row in enumerate(rows.select_columns(list(self.columns))):
            try:
                found.append(self.question(str(number), row))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                place = f"row {number} of source {self.name!r} ({self.location()['path']})"
                raise PruneForgeError(f"{place} is no question as expected: {error}") from error
        check_distinct(found, f"source {self.name!r} ({self.location()['path']})")
        return found

    @abstractmethod
    def question(self, number: str, row: Mapping[str, Any]) -> Question:
        """Return the question of a row."""

    def describe(self, part: Part) -> dict[str, Any]:
        """Return the data set."""
        location = {key: value for key, value in self.location().items() if value is not None}
        return {"dataset": location.pop("path"), **location}


class AIME2024(_HubQuestions):
    """The 30 problems of the American Invitational Mathematics Examination 2024; answers are 0 to 999.

    A problem is the more difficult the later it comes in its examination, of 15.
    """

    path = "Maxwell-Jia/AIME_2024"
    split = "train"
    columns = ("ID", "Problem", "Answer")
    kind = "integer"

    def question(self, number: str, row: Mapping[str, Any]) -> Question:
        """Return a problem, difficult by the third of its examination."""
        place = int(row["ID"].rpartition("-")[2])
        first = 1 + (place - 1) // 5 * 5
        told = "Reason step by step, and put the final answer, a whole number, within \\boxed{}."
        text = f"{_text(row['Problem'])}\n\n{told}"
        return Question(row["ID"], text, (str(int(row["Answer"])),), self.kind, f"problems {first} to {first + 4}")


class FOLIO(_HubQuestions):
    """The 203 questions of FOLIO's validation split: does a conclusion follow from premises (Han et al., 2022)?

    Its terms on the Hub are to be accepted first. Difficulty is the number of premises.
    """

    path = "yale-nlp/FOLIO"
    split = "validation"
    columns = ("premises", "conclusion", "label")
    kind = "truth"

    def question(self, number: str, row: Mapping[str, Any]) -> Question:
        """Return a question, difficult by the number of its premises."""
        premises = row["premises"] if isinstance(row["premises"], str) else "\n".join(row["premises"])
        count = sum(1 for line in premises.splitlines() if line.strip())
        text = (
            "Use logic to decide whether the conclusion is true, false or uncertain, given the premises. Reason step "
            "by step, and end with one of the three words.\n\n"
            f"Premises:\n{premises.strip()}\n\nConclusion:\n{_text(row['conclusion'])}"
        )
        difficulty = "up to 5 premises" if count <= 5 else "6 premises or more"
        return Question(number, text, (truth(row["label"]),), self.kind, difficulty)


class TemporalSequences(_HubQuestions):
    """The 250 questions of BIG-Bench Hard about when somebody can have done something (Suzgun et al., 2022)."""

    path = "SaylorTwift/bbh"
    config = "temporal_sequences"
    split = "test"
    columns = ("input", "target")
    kind = "letter"

    def question(self, number: str, row: Mapping[str, Any]) -> Question:
        """Return a question; all are made by one template, and as difficult."""
        text = (
            f"{row['input'].strip()}\n\nReason step by step along the timeline, and end with the letter of the answer."
        )
        return Question(number, text, (row["target"].strip("() "),), self.kind, "all")


class MuSiQue(_HubQuestions):
    """Questions of several hops from MuSiQue's validation split, without the paragraphs (Trivedi et al., 2022).

    What a question asks for has to be known: answers show what is left of a model's knowledge. The paper asks 100 of
    the 2,417; its choice can be given as a file to the source `questions`. Difficulty is the number of hops.
    """

    path = "dgslibisey/MuSiQue"
    split = "validation"
    columns = ("id", "question", "answer", "answer_aliases")
    kind = "text"

    def question(self, number: str, row: Mapping[str, Any]) -> Question:
        """Return a question, difficult by the number of its hops."""
        text = (
            f"{row['question'].strip()}\n\nThink step by step. End with a line `Final answer:` and the answer in as "
            "few words as possible."
        )
        hops = int(row["id"].partition("hop")[0])
        answers = tuple(dict.fromkeys([row["answer"], *row["answer_aliases"]]))
        return Question(row["id"], text, answers, self.kind, f"{hops} hops")


def _text(value: Any) -> str:
    """Return a text without the blanks around it.

    Raises:
        ValueError: It is none, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value.strip()
