"""What Ctrl-C does to a command, and a scheduler's SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME = 1.0
"""Seconds within which signals count as one: schedulers and `timeout` send theirs to a process and to its group."""


class Stopped(KeyboardInterrupt):
    """A signal that asks a command to stop.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        """Remember which signal it was."""
        super().__init__(number)
        self.number = number


def stop_in_order() -> None:
    """Have SIGTERM stop a command as Ctrl-C does, by an exception; a second signal then ends the process at once.

    What is on the disk can go on after either. Signals that whoever started the process has it ignore stay ignored.
    """
    ours = [each for each in _SIGNALS if signal.getsignal(each) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, _stop) for number in ours}
    # Python runs a handler between two steps of its own. A thread sees the second signal even while the first still
    # waits for a call into a library to return, which between processes may be hours.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(reading, ours), name="pruneforge-signals", daemon=True).start()

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)

    # A forked process, such as one that reads images, would tell the thread of its parent of its own signals.
    os.register_at_fork(after_in_child=forget)


def _end_at_the_second(reading: int, ours: list[signal.Signals]) -> None:
    first: float | None = None
    while received := os.read(reading, 1):
        if received[0] not in ours:
            continue
        first = first or time.monotonic()
        if time.monotonic() - first > SAME:
            os._exit(128 + received[0])


def _stop(number: int, frame: Any) -> None:
    for each in _SIGNALS:
        if signal.getsignal(each) is _stop:
            signal.signal(each, _ignore)  # what ends now is not interrupted again, but for the thread's end
    raise Stopped(number)


def _ignore(number: int, frame: Any) -> None:
    """Do nothing; unlike with SIG_IGN the thread still hears of the signal."""


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Say, where a run is interrupted within the context, what an output folder holds of it to go on from."""
    from pruneforge.checkpoint.journal import JOURNAL_FILE

    try:
        yield
    except KeyboardInterrupt as error:
        if not any(output.rglob(JOURNAL_FILE)):
            raise
        print(f"pruneforge: interrupted; {output} holds what is finished, go on with --resume", file=sys.stderr)
        raise stopped(error) from None


def stopped(error: KeyboardInterrupt) -> typer.Exit:
    """Return what ends a command that was stopped, with the exit code that shells give to its signal."""
    return typer.Exit(128 + (error.number if isinstance(error, Stopped) else signal.SIGINT))
