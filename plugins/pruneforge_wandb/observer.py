"""Runs logged to Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneforge import Observer


class WandB(Observer):
    """Logs to Weights & Biases, as its environment variables say, such as `WANDB_ENTITY` and `WANDB_MODE`."""

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the project, beside others of this process."""
        import wandb

        settings = wandb.Settings(console="off")  # what is printed are bars and the command's own result
        self._run = wandb.init(
            project=self.options.project, name=name, config=dict(config), reinit="create_new", settings=settings
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a block."""
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, as failed without a summary."""
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=0 if summary is not None else 1)
