"""The ridge recovery."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `ridge`."""
    registry.recovery("ridge", "pruneforge_ridge.recovery:Ridge")
