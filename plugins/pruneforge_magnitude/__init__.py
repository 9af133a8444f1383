"""Magnitude pruning."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("magnitude", "pruneforge_magnitude.metric:Magnitude")
