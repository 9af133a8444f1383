"""Runs logged to MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneforge import Observer


class MLflow(Observer):
    """Logs to MLflow: to the server or store that `MLFLOW_TRACKING_URI` names; the project is the experiment."""

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the experiment, which is made if there is none."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(self.options.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.options.project)
        self._id = self._client.create_run(number, run_name=name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._id, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a block."""
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, as failed without a summary; texts of the summary are tags."""
        for key, value in (summary or {}).items():
            if isinstance(value, str):
                self._client.set_tag(self._id, key, value)
            else:
                self._client.log_metric(self._id, key, value)
        self._client.set_terminated(self._id, "FINISHED" if summary is not None else "FAILED")
