"""Which options a command line holds, in whatever form they were typed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any


def typed_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each option: `--a-b VALUE`, `--a-b=VALUE`, `a_b=VALUE`, `NAME.a_b=VALUE` or in JSON.

    What might be read in two ways is yielded twice.
    """
    for flag, value in itertools.pairwise([*arguments, ""]):
        name, equals, given = flag.removeprefix("--").partition("=")
        if flag.startswith("--"):
            yield name.replace("-", "_"), given if equals else value
        for assigned in re.finditer(r"(?:^|[.=])(\w+)=", flag):
            text = flag[assigned.end() :]
            yield assigned[1], text
            if text.startswith(("{", "[")):
                yield from _within(_json(text))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _within(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the names and texts in a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if isinstance(item, str):
            yield str(name), item
        yield from _within(item)
