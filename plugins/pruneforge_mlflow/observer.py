"""Runs logged to MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pruneforge import Observer


class MLflow(Observer):
    """Logs to MLflow: to the server or store that `MLFLOW_TRACKING_URI` names; the project is the experiment."""

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the experiment, which is made if there is none; it has failed if it cannot be begun whole."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(self.options.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.options.project)
        self._id = self._client.create_run(number, run_name=name).info.run_id
        try:
            self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in config.items()])
        except BaseException:
            self._client.set_terminated(self._id, "FAILED")  # or it would be shown as running for ever
            raise

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a block."""
        self._send(values, step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, as failed without a summary; texts of the summary are tags."""
        self._send(summary or {}, step=0)
        self._client.set_terminated(self._id, "FINISHED" if summary is not None else "FAILED")

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        """Send numbers as metrics and texts as tags, in one request."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)  # what MLflow counts in
        texts = {key: value for key, value in values.items() if isinstance(value, str)}
        metrics = [Metric(key, value, now, step) for key, value in values.items() if key not in texts]
        self._client.log_batch(self._id, metrics, tags=[RunTag(key, value) for key, value in texts.items()])
