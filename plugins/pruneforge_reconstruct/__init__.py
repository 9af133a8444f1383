"""The reconstruction of blocks."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `reconstruct`."""
    registry.recovery("reconstruct", "pruneforge_reconstruct.recovery:Reconstruct")
