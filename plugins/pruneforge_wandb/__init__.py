"""Runs logged to Weights & Biases."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the observer."""
    registry.observer("wandb", "pruneforge_wandb.observer:WandB", library="wandb", extra="wandb")
