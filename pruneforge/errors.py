"""Errors that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PruneForgeError(Exception):
    """A problem that the user can mend.

    Its text is one line that names the thing and the way out. The command line prints that line and
    exits with code 2; from Python it is raised before anything is written, or what was written is removed again.
    """


class UnfinishedError(PruneForgeError):
    """What stopped a run that can go on from where it was, once that is mended."""


class DeviceFullError(UnfinishedError):
    """A device, or the host, has no memory for what was asked of it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> PruneForgeError:
    """Return the error for a name that nobody registered, with the nearest one that somebody did.

    Args:
        kind: What was asked for, as the message should call it: `metric`, `option of` a metric.
        name: The unknown name.
        known: The names there are.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return PruneForgeError(f"unknown {kind} {name!r}; {hint}")
