"""Runs logged to MLflow."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the observer."""
    registry.observer("mlflow", "pruneforge_mlflow.observer:MLflow", library="mlflow", extra="mlflow")
