"""Magnitude pruning."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("magnitude", "pruneforge_magnitude.metric:Magnitude")
