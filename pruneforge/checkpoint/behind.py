"""Run tasks in the background, one task behind the caller."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Runs tasks in order in one thread: one task runs while the caller prepares the next, and none are queued.

    A queue would keep the tensors of all its tasks in memory; this way at most one block waits to be written.
    """

    def __init__(self, name: str, initializer: Callable[[], object] | None = None) -> None:
        """Create the worker; its thread starts with the first task.

        Args:
            name: Name of the thread.
            initializer: Called first in the thread.
        """
        self._thread = ThreadPoolExecutor(1, name, initializer=initializer)
        self._last: Future[None] | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Wait for the task before, then start `task`.

        Raises:
            Exception: The error of the task before; `task` is then not started.
        """
        self.wait()
        self._last = self._thread.submit(task)

    def wait(self) -> None:
        """Wait for the last task.

        Raises:
            Exception: The error of that task, once.
        """
        last, self._last = self._last, None  # forgotten first, so that its error is raised once
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for the last task, ignoring its error, and accept no more."""
        self._thread.shutdown()
