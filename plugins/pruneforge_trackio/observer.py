"""Runs logged to Trackio, whose projects lie in a folder of the user's, or in a Space of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from functools import partial
from typing import Any

from pruneforge import Observer


class Trackio(Observer):
    """Logs to Trackio: locally, or where `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` says; `trackio show` shows it.

    A Space that is made for it is private, and the machine's statistics are left out.
    """

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the project."""
        import trackio

        # In a context of its own: in one context, each run that begins ends the one before.
        begin = partial(trackio.init, private=True, auto_log_cpu=False, auto_log_gpu=False)
        self._run = Context().run(begin, self.options.project, name, config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a block."""
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, with the summary as its last step, or `run/failed`: Trackio's runs have no state."""
        self._run.log(dict(summary) if summary is not None else {"run/failed": 1})
        self._run.finish()
