"""What Ctrl-C does to a command, and a scheduler's SIGTERM."""

from __future__ import annotations

import signal
from typing import Any

import typer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    for each in _SIGNALS:
        if signal.getsignal(each) is _stop:
            signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)


def stopped(error: KeyboardInterrupt) -> typer.Exit:
    """Return what ends a command that was stopped, with the exit code that shells give to its signal."""
    return typer.Exit(128 + (error.number if isinstance(error, Stopped) else signal.SIGINT))
