"""Runs logged to Trackio, whose projects lie in a folder of the user's, or in a Space of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any

from pruneforge import Observer


class Trackio(Observer):
    """Logs to Trackio: locally, or where `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` says; `trackio show` shows it."""

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the project."""
        import trackio

        # In a context of its own: in one context, each run that begins ends the one before.
        self._run = Context().run(trackio.init, self.options.project, name, config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a block."""
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, with the summary as its last step."""
        if summary is not None:
            self._run.log(dict(summary))
        self._run.finish()
