"""Wanda: pruning by weights and activations."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("wanda", "pruneforge_wanda.metric:Wanda")
