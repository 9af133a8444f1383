"""Sums of several steps, made up: questions for a small language model, and worked examples to train it on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from pruneforge import TextSource
from pruneforge.data.text import Part
from pruneforge_reasoning.questions import Question, QuestionSource

ALPHABET = "0123456789+=;"
END = "</s>"
LARGEST = 9
"""Largest summand."""


class Sums(QuestionSource):
    """Sums of digits, such as `3+9+4=`, of as many steps as there are plus signs, answered `3+9=12;12+4=16`.

    All are drawn by the `seed`. Calibration text is worked examples drawn by another, so that it holds none of the
    questions by design; sums of one step are few, and some occur in both.
    """

    separator = ""

    class Options(TextSource.Options):
        """Options of the sums."""

        pack: bool = Field(True, description="join worked examples and cut the result; each is short")
        steps: list[Annotated[int, Field(ge=1)]] = Field(
            [1, 3, 6], min_length=1, description="numbers of steps, each a difficulty of its own"
        )
        count: int = Field(100, ge=1, description="questions of each number of steps")
        seed: int = Field(0, ge=0, description="draws the sums")

    options: Options

    def questions(self) -> Sequence[Question]:
        """Return `count` questions of each number of steps."""
        found = []
        for steps in dict.fromkeys(self.options.steps):
            draw = random.Random(f"questions {self.options.seed} {steps}")
            for number in range(self.options.count):
                summands = drawn(draw, steps)
                name = f"{steps}-{number}"
                difficulty = f"{steps} step{'s' if steps > 1 else ''}"
                found.append(Question(name, question(summands), (str(sum(summands)),), "integer", difficulty))
        return found

    def documents(self, part: Part) -> Sequence[str]:
        """Return the questions, or for calibration 4,096 worked examples of sums with 1 to 6 steps."""
        if part == "evaluation":
            return super().documents(part)
        draw = random.Random(f"worked {self.options.seed}")
        return [f"{''.join(example)}{END}" for example in worked(draw, 4096)]

    def describe(self, part: Part) -> dict[str, Any]:
        """Return how the sums were drawn."""
        return {name: getattr(self.options, name) for name in ("steps", "count", "seed")}


def drawn(draw: random.Random, steps: int) -> list[int]:
    """Return the summands of a sum, `steps + 1` of them."""
    return [draw.randint(0, LARGEST) for _ in range(steps + 1)]


def question(summands: Sequence[int]) -> str:
    """Return a sum as it is asked."""
    return "+".join(map(str, summands)) + "="


def answer(summands: Sequence[int]) -> str:
    """Return its answer, step by step."""
    total, steps = summands[0], []
    for summand in summands[1:]:
        steps.append(f"{total}+{summand}={total + summand}")
        total += summand
    return ";".join(steps)


def worked(draw: random.Random, count: int, longest: int = 6) -> Iterator[tuple[str, str]]:
    """Yield questions of 1 to `longest` steps with their answers."""
    for _ in range(count):
        summands = drawn(draw, draw.randint(1, longest))
        yield question(summands), answer(summands)
