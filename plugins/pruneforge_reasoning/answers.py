"""Find the answer in what a model wrote, and compare it with the right ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

Kind = Literal["integer", "letter", "truth", "text"]
"""What an answer is: a whole number, the letter of a choice, true, false or uncertain, or a few words."""

KINDS: tuple[Kind, ...] = get_args(Kind)

END_OF_THOUGHT = "</think>"

_ANNOUNCED = re.compile(r"answer\b[^\n:]{0,60}?(?:\bis\b|:)[ \t*_:]*\n?([^\n]*\S[^\n]*)", re.IGNORECASE)
"""What follows "the answer is" or "Final answer:", to the end of the line."""

_BOXED = re.compile(r"\\boxed\s*\{")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")

_TOKENS: Mapping[Kind, re.Pattern[str]] = {
    # No more digits than any answer has: a model that fails may repeat one without end.
    "integer": re.compile(r"(?<![\d.,])-?(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,18})(?![.,]?\d)"),
    "letter": re.compile(r"\(([A-Z])\)"),
    "truth": re.compile(
        r"\b(not (?:\w+ )?true|not (?:\w+ )?false|true|false|uncertain|unknown|cannot be determined)\b", re.IGNORECASE
    ),
}
"""What stands for an answer of each kind but text."""

_MARKED = {**_TOKENS, "letter": re.compile(r"\b([A-Z])\b")}
"""The same in a place that is marked as the answer, where a letter needs no parentheses."""


def extract(written: str, kind: Kind, ended: bool = True) -> str:
    r"""Return the answer in what a model wrote, or an empty text.

    Only what stands behind the last `</think>` counts, if there is one. Of that the last `\boxed{...}` is taken, else
    the last that is announced ("The answer is ...", "Final answer: ..."), else, if the model came to an end, the last
    word of the kind that was asked for, or for `text` the last line.

    Args:
        written: All that the model wrote.
        kind: What the answer is.
        ended: Whether the model came to an end of its own. The last number before it was cut off is no answer.
    """
    said = written.rpartition(END_OF_THOUGHT)[2]
    for place in (_boxed(said), _announced(said)):
        # "The answer is m + n = 33, since ...": the first number, but behind a sign of equality.
        marked = place.rpartition("=")[2] if kind == "integer" else place
        found = _plain(place) if kind == "text" else _word(_MARKED[kind].findall(marked)[:1], kind)
        if found:
            return found
    if not ended:
        return ""
    if kind == "text":
        return _plain(next((line for line in reversed(said.splitlines()) if line.strip()), ""))
    return _word(_TOKENS[kind].findall(said)[-1:], kind)


def _boxed(text: str) -> str:
    r"""Return what the last `\boxed{...}` with as many closing braces as opening ones holds."""
    for start in reversed([match.end() for match in _BOXED.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return _WRAPPER.sub(r"\1", text[start:place])
    return ""


def _announced(text: str) -> str:
    found = _ANNOUNCED.findall(text)
    return found[-1] if found else ""


def _word(found: list[str], kind: Kind) -> str:
    """Return the word that was found, spelled in one way, or an empty text."""
    if not found:
        return ""
    if kind == "integer":
        return str(int(found[0].replace(",", "")))
    return _truth(found[0].lower()) if kind == "truth" else found[0]


def _truth(words: str) -> str:
    """Return true, false or uncertain for one of them, "not true", "not necessarily true", "unknown" and the like."""
    if words in ("true", "false"):
        return words
    if words.startswith("not ") and "necessarily" not in words:
        return "false" if words.endswith("true") else "true"
    return "uncertain"


def _plain(text: str) -> str:
    """Return a line without marks of Markdown and the full stop."""
    return text.strip().strip("*_`\"' ").rstrip(".").strip("*_`\"' ")


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and further blanks (SQuAD; Rajpurkar et al., 2016)."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(found: str, answer: str) -> float:
    """Return 1 if two texts are the same when normalised, else 0."""
    return float(normalized(found) == normalized(answer))


def f1(found: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the words of `found`, normalised (SQuAD)."""
    words, wanted = normalized(found).split(), normalized(answer).split()
    if not words or not wanted:
        return float(words == wanted)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted))


def best(score: Callable[[str, str], float], found: str, answers: Sequence[str]) -> float:
    """Return the score with that of several right answers which fits best; nothing found has none."""
    return max(score(found, answer) for answer in answers) if found else 0.0


def right(found: str, answers: Sequence[str], kind: Kind) -> float:
    """Return 1 if an extracted answer is one of the right ones, else 0: numbers by value, else as `exact_match`."""
    if kind != "integer":
        return best(exact_match, found, answers)
    return float(found != "" and int(found) in {int(answer) for answer in answers})
