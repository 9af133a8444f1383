"""Wanda++: pruning by regional gradients."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("wanda++", "pruneforge_wandapp.metric:WandaPP")
