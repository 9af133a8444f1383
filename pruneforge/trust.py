"""Code that a setting names, such as a folder of task definitions: it runs only where a person asked for it by name.

From Python the caller is that person. A command says what was typed; what a recipe or a study alone names is refused,
and also what a plugin makes by itself within a command, unless it says so with `typed`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pruneforge.errors import PruneForgeError

VARIABLE = "PRUNEFORGE_TYPED"
"""Variable with the options that the running command was given by hand, which the processes that it starts inherit.
What a study names is checked before it is given to others, such as those of a cluster."""


@contextmanager
def typed(options: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Refuse code within the context that none of a command's options names.

    Args:
        options: Names of options and their values, as far as they were typed.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(sorted(set(options)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def check_typed(option: str, value: str) -> None:
    """Raise if a command runs that was not given an option by hand.

    Args:
        option: Name of the option, whose value is code to run.
        value: Its value.

    Raises:
        PruneForgeError: Saying what to type.
    """
    options = json.loads(os.environ.get(VARIABLE, "null"))
    if options is not None and [option, value] not in options:
        raise PruneForgeError(
            f"a recipe or study says {option} {value!r}, which may run code; if you trust it, say so on the command "
            f"line too: {value!r} for `{option}`, or with a study {f'{option}={value}'!r} for `trust`"
        )
