"""Wanda: pruning by weights and activations."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("wanda", "pruneforge_wanda.metric:Wanda")
