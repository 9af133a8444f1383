"""Progress of long steps: silent, bars with the remaining time on a terminal, or plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

EVERY = 30.0
"""Seconds between two lines about a step that goes on."""


class Progress:
    """Iterates without showing anything."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, showing progress.

        Args:
            items: The items.
            description: Description of the step, for users.
            total: Number of items, if `items` has no length.
        """
        yield from items

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        """Show that something which cannot be counted goes on within the context.

        Args:
            description: Description of the step, for users.
        """
        for _ in self.track((None,), description):
            yield


class BarProgress(Progress):
    """Shows a bar for each running step on standard error, which is a terminal."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(file=sys.stderr),  # that of now: what is redirected later is other libraries' output
            transient=True,
        )
        self._running = 0

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` with a bar; bars of nested steps are shown below one another."""
        if self._running == 0:
            self._bars.start()
        self._running += 1
        task = self._bars.add_task(description, total=_total(items, total))
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
            self._running -= 1
            if self._running == 0:
                self._bars.stop()


@dataclass
class _Step:
    """A step that is running, and how many of its items are done."""

    description: str
    total: int | None
    begun: float = field(default_factory=time.monotonic)
    done: int = 0

    def __str__(self) -> str:
        if self.total == 1:
            return self.description
        count = f"{self.done:,}" + ("" if self.total is None else f" of {self.total:,}")
        text = f"{self.description}, {count}"
        if self.total and self.done:
            left = (time.monotonic() - self.begun) / self.done * (self.total - self.done)
            text += f", about {timedelta(seconds=round(left))} left"
        return text


class LineProgress(Progress):
    """Prints a line to standard error when an outermost step begins, and every half minute where all steps are."""

    def __init__(self, every: float = EVERY) -> None:
        """Print nothing yet.

        Args:
            every: Seconds between two lines about steps that go on.
        """
        self._every = every
        self._begun = time.monotonic()
        self._stream = sys.stderr  # that of now: what is redirected later is other libraries' output
        self._steps: list[_Step] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, and print lines."""
        step = _Step(description, _total(items, total))
        self._steps.append(step)
        outermost = len(self._steps) == 1
        try:
            if outermost:
                self._start()
            for item in items:
                yield item
                step.done += 1
        finally:
            self._steps.remove(step)
            if outermost:
                self._end()

    def report(self) -> None:
        """Print a line that says where the steps are, the outermost first."""
        steps = "; ".join(map(str, list(self._steps)))
        if steps:
            passed = timedelta(seconds=int(time.monotonic() - self._begun))
            print(f"[{passed}] {steps}", file=self._stream, flush=True)

    def _start(self) -> None:
        self.report()
        # A thread, since one item may take minutes. It is joined: none lives on when the interpreter ends.
        self._stop.clear()
        self._thread = threading.Thread(target=self._go_on, name="pruneforge-progress", daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        while not self._stop.wait(self._every):
            self.report()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _total(items: Iterable[T], total: int | None) -> int | None:
    return len(items) if total is None and isinstance(items, Sized) else total


def as_progress(progress: bool | Progress) -> Progress:
    """Return `progress` itself; for `True` bars on a terminal and lines elsewhere; or silence for `False`."""
    if isinstance(progress, Progress):
        return progress
    if not progress:
        return Progress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()
