"""The PERP recovery."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `perp`."""
    registry.recovery("perp", "pruneforge_perp.recovery:Perp")
