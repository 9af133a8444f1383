"""Sums of several steps, made up: questions for a small language model, and worked examples to train it on."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Annotated, Any

from pydantic import Field

from pruneforge import TextSource
from pruneforge.data.text import Part
from pruneforge_reasoning.questions import Question, QuestionSource

ALPHABET = "0123456789+=;"
END = "</s>"
LARGEST = 9
"""Largest summand."""

FEW = 3
"""Steps up to which all sums are gone through; there are ten thousand of three."""


class Sums(QuestionSource):
    """Sums of digits, such as `3+9+4=`, of as many steps as there are plus signs, answered `3+9=12;12+4=16`.

    Of sums of two steps and more, a tenth is held out: questions are of these, each asked once, and worked examples, of
    which calibration text and training data are made, of the others. There are but a hundred sums of one step, which
    both are of.
    """

    separator = ""

    class Options(TextSource.Options):
        """Options of the sums."""

        pack: bool = Field(True, description="join worked examples and cut the result; each is short")
        steps: list[Annotated[int, Field(ge=1)]] = Field(
            [1, 3, 6], min_length=1, description="numbers of steps, each a difficulty of its own"
        )
        count: int = Field(
            100, ge=1, le=5000, description="questions of each number of steps, or all if they are fewer"
        )
        seed: int = Field(0, ge=0, description="draws the sums")

    options: Options

    def questions(self) -> Sequence[Question]:
        """Return `count` questions of each number of steps."""
        found = []
        for steps in dict.fromkeys(self.options.steps):
            difficulty = f"{steps} step{'s' if steps > 1 else ''}"
            for number, summands in enumerate(self._asked(steps)):
                answers = (str(sum(summands)),)
                found.append(Question(f"{steps}-{number}", question(summands), answers, "integer", difficulty))
        return found

    def _asked(self, steps: int) -> list[tuple[int, ...]]:
        """Return the sums of so many steps that are asked, each once."""
        draw, count = random.Random(f"questions {self.options.seed} {steps}"), self.options.count
        if steps <= FEW:
            every = product(range(LARGEST + 1), repeat=steps + 1)
            some = [summands for summands in every if steps == 1 or held_out(summands)]
            return draw.sample(some, min(count, len(some)))
        found: dict[tuple[int, ...], None] = {}
        while len(found) < count:
            summands = drawn(draw, steps)
            if held_out(summands):
                found[summands] = None
        return list(found)

    def documents(self, part: Part) -> Sequence[str]:
        """Return the questions, or for calibration 4,096 worked examples of sums with 1 to 6 steps."""
        if part == "evaluation":
            return super().documents(part)
        draw = random.Random(f"worked {self.options.seed}")
        return [f"{''.join(example)}{END}" for example in worked(draw, 4096)]

    def describe(self, part: Part) -> dict[str, Any]:
        """Return how the sums were drawn."""
        return {name: getattr(self.options, name) for name in ("steps", "count", "seed")}


def drawn(draw: random.Random, steps: int) -> tuple[int, ...]:
    """Return the summands of a sum, `steps + 1` of them."""
    return tuple(draw.randint(0, LARGEST) for _ in range(steps + 1))


def held_out(summands: Sequence[int]) -> bool:
    """Return whether a sum is among those that are asked, and never shown: a tenth of those of two steps and more."""
    return len(summands) > 2 and zlib.crc32(question(summands).encode()) % 10 == 0


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
    """Yield questions of 1 to `longest` steps with their answers, but none that is held out."""
    while count:
        summands = drawn(draw, draw.randint(1, longest))
        if not held_out(summands):
            yield question(summands), answer(summands)
            count -= 1
