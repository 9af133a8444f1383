"""Runs logged to Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneforge import Observer

FINISH_TIMEOUT = 120.0
"""Seconds to wait for the last upload; what was not sent by then stays in the local folder, for `wandb sync`."""


class WandB(Observer):
    """Logs to Weights & Biases, as its environment variables say, such as `WANDB_ENTITY` and `WANDB_MODE`.

    What its library would send by itself is left out: host, command, code, git's remote and commit, installed packages
    and the machine's statistics.
    """

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the project, beside others of this process."""
        import wandb

        settings = wandb.Settings(
            console="off",  # what is printed are bars and the command's own result
            host="",
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,  # the command and a job too, beside what the two below are about
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        self._run = wandb.init(
            project=self.options.project, name=name, config=dict(config), reinit="create_new", settings=settings
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a block."""
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, as failed without a summary.

        Raises:
            TimeoutError: Not everything could be sent within `FINISH_TIMEOUT`.
        """
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=0 if summary is not None else 1)
