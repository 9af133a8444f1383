"""Scores of an answer beside the right ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from pruneforge_reasoning.answers import Kind


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
