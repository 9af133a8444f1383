"""Progress of long steps: silent, or bars with the remaining time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Iterates without showing anything.

    Attributes:
        shown: Whether progress is visible; other libraries' bars are switched on or off accordingly.
    """

    shown = False

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, showing progress.

        Args:
            items: The items.
            description: Description of the step, for users.
            total: Number of items, if `items` has no length.
        """
        yield from items


class BarProgress(Progress):
    """Shows a bar for each running step on standard error; silent if that is not a terminal."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.shown = console.is_terminal
        self._running = 0

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` with a bar; bars of nested steps are shown below one another."""
        if total is None:
            total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
        if self._running == 0:
            self._bars.start()
        self._running += 1
        task = self._bars.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
            self._running -= 1
            if self._running == 0:
                self._bars.stop()


def as_progress(progress: bool | Progress) -> Progress:
    """Return `progress` itself, bars for `True`, or silence for `False`."""
    if isinstance(progress, Progress):
        return progress
    return BarProgress() if progress else Progress()
