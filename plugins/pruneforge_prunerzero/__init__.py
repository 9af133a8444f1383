"""The Pruner-Zero metric."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `pruner-zero`."""
    registry.metric("pruner-zero", "pruneforge_prunerzero.metric:PrunerZero")
