"""Work that goes on beside the caller, one task behind it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Runs tasks in a thread of its own, in order: one goes on while the caller makes the next, and no more wait."""

    def __init__(self, name: str, initializer: Callable[[], object] | None = None) -> None:
        """Name the thread and what it calls first; it begins with the first task."""
        self._thread = ThreadPoolExecutor(1, name, initializer=initializer)
        self._last: Future[None] | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task when the one before is over.

        Raises:
            Exception: What the task before raised; then the new one is not begun.
        """
        self.wait()
        self._last = self._thread.submit(task)

    def wait(self) -> None:
        """Wait until the last task is over.

        Raises:
            Exception: What it raised.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait until the last task is over, whatever becomes of it; nothing is begun any more."""
        self._thread.shutdown()
