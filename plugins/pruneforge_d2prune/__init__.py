"""The D2Prune metric."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `d2prune`."""
    registry.metric("d2prune", "pruneforge_d2prune.metric:D2Prune")
