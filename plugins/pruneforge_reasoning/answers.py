"""Find the answer in what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, get_args

Kind = Literal["integer", "letter", "truth", "text"]
"""What an answer is: a whole number, the letter of a choice, true, false or uncertain, or a few words."""

KINDS: tuple[Kind, ...] = get_args(Kind)

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"

_NEXT_QUESTION = re.compile(r"\n\W*(?:Question|Q):")
_TAGS = re.compile(r"</?answer>", re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\s*\{|[{}]")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")

_FINAL = re.compile(
    r"final\s+answer\b(?:[^\n:]{0,60}?(?:\bis\b|:)|[*_#]*[ ]*\n)[\s*_:]{0,20}([^\n]{0,300})", re.IGNORECASE
)
_OTHER = re.compile(r"(?<!to )(?<!the )answer\b[^\n:]{0,60}?(?:\bis\b|:)[\s*_:]{0,20}([^\n]{0,300})", re.IGNORECASE)
_THE = re.compile(
    r"(?<!check )(?<!verify )the answer\b[^\n:]{0,60}?(?:\bis\b|:)[\s*_:]{0,20}([^\n]{0,300})", re.IGNORECASE
)
"""What is announced by "Final answer:", by "Answer:", and by "the answer is", to the end of the line."""

_ANSWER = re.compile(r"(?:final\s+|the )?answer\b", re.IGNORECASE)

# No more digits than any answer has: a model that fails may repeat one without end.
_NUMBER = re.compile(r"(?<![\d.,])(-?(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,18}))(?:\.0+)?(?![.,]?\d)")
_CLAUSE = re.compile(r"[(;]|[,.]\s|\*\*|\s(?:where|when|since|as|because|with|for)\b")
"""What ends the expression that a number is announced with."""

_IN_PARENTHESES = re.compile(r"(?<!not )\(([A-Za-z])\)")
_BARE = re.compile(r"(?<!not )\b(?!I\b|A [a-z])([A-Z])\b(?!['’])")
_NAMED = re.compile(r"\b(?:option|choice|letter)(?: is)?\W{1,5}([A-Z])\b")
_FIRST = re.compile(r"\W*([A-Z])(?:\W*|[).:]\W*\s.*)")

_EITHER = re.compile(
    r"\b(?:true,? false,? (?:or|and) uncertain|true or false|true/false(?:/uncertain)?|"
    r"whether [^.\n;]{0,80}?\b(?:true|false)(?: or \w+)?)\b"
)
_UNCERTAIN = (
    r"neither true nor false|uncertain|unknown|undetermined|indeterminate|"
    r"(?:not|n['’]t) (?:be )?(?:\w+ )?(?:proven|known|certain|sure|definitive|definitively|necessarily)(?: \w+){0,2}|"
    r"can(?:not|['’]t) (?:be )?(?:determined?|inferr?(?:ed)?|concluded?|known?)"
)
_TRUTH = re.compile(rf"(?P<uncertain>{_UNCERTAIN})|(?P<no>(?:not|n['’]t)(?: be)?(?: \w+)? )?\b(?P<word>true|false)\b")


def extract(written: str, kind: Kind, ended: bool = True) -> str:
    r"""Return the answer in what a model wrote, or an empty text.

    Only what stands behind `</think>` counts, if there is one, and before a further question that the model makes up.
    Of that the last `\boxed{...}` is taken; else the last that is announced: by "Final answer:", or if there is none,
    by "Answer:" or "the answer is". Else, if the model came to an end, it is the last number or truth value, the
    letter of the last line or the last in parentheses, or for `text` the last line.

    Args:
        written: All that the model wrote, with the opening that it was given.
        kind: What the answer is.
        ended: Whether the model came to an end of its own. If not, the last number is no answer, and neither is
            anything within a thought that goes on.
    """
    if not ended and THOUGHT in written and END_OF_THOUGHT not in written:
        return ""
    said = _said(written, kind)
    for place in (_boxed(said), *_announced(said)):
        if found := _marked(place, kind):
            return found
    return _last(said, kind) if ended else ""


def _said(written: str, kind: Kind) -> str:
    said = written.partition(END_OF_THOUGHT)[2] if END_OF_THOUGHT in written else written
    said = _TAGS.sub("\n", said.replace(END_OF_THOUGHT, "\n"))
    following = _NEXT_QUESTION.search(said, len(said) - len(said.lstrip()))
    said = said[: following.start()] if following else said
    if kind == "integer":
        said = said.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("−", "-")
    return said


def _boxed(text: str) -> str:
    r"""Return what the last `\boxed{...}` with as many closing braces as opening ones holds."""
    opened: list[tuple[int, bool]] = []
    last = (0, 0)
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append((match.end(), match[0] != "{"))
        elif opened:
            start, is_boxed = opened.pop()
            last = max(last, (start, match.start())) if is_boxed else last
    return _WRAPPER.sub(r"\1", text[slice(*last)])


def _announced(text: str) -> Iterator[str]:
    """Yield what is announced as the answer, the most binding first, and the last of each kind first."""
    starts = [match.start() for match in _ANSWER.finditer(text)][::-1]
    for pattern in (_FINAL, _THE, _OTHER):
        for start in starts:
            if match := pattern.match(text, start):
                yield match[1]


def _marked(place: str, kind: Kind) -> str:
    """Return the answer in a place that is marked as such, which is the first there."""
    if kind == "text":
        return _plain(place)
    if kind == "truth":
        return next(iter(_truths(place)), "")
    if kind == "letter":
        letter = _IN_PARENTHESES.search(place) or _BARE.search(place)
        return letter[1].upper() if letter else ""
    # "The answer is m + n = 33, since ...": in the leading expression, what is behind a sign of equality.
    expression = _CLAUSE.split(place.replace("^\\circ", "").replace("^{\\circ}", ""), maxsplit=1)[0].rpartition("=")[2]
    number = None if "^" in expression or "\\frac" in expression else _NUMBER.search(expression)
    return _number(number[1]) if number else ""


def _last(said: str, kind: Kind) -> str:
    """Return the answer in a text that marks none."""
    line = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if kind == "text":
        return _plain(line)
    if kind == "truth":
        return next(reversed(_truths(said)), "")
    if kind == "integer":
        numbers = _NUMBER.findall(said)
        return _number(numbers[-1]) if numbers else ""
    alone = _FIRST.fullmatch(line)
    letters = _NAMED.findall(said) or _IN_PARENTHESES.findall(said)
    return alone[1] if alone else letters[-1].upper() if letters else ""


def _number(digits: str) -> str:
    return str(int(digits.replace(",", "")))


def _truths(text: str) -> list[str]:
    """Return the truth values that a text states, as true, false and uncertain; none where it names several at once."""
    found = []
    for match in _TRUTH.finditer(_EITHER.sub(" ", text.lower())):
        if match["uncertain"]:
            found.append("uncertain")
        else:
            found.append(match["word"] if not match["no"] else "false" if match["word"] == "true" else "true")
    return found


def _plain(text: str) -> str:
    """Return a line without marks of Markdown and the full stop."""
    return text.strip().strip("*_`\"' ").rstrip(".").strip("*_`\"' ")
