"""The ERK allocator."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `erk`."""
    registry.allocator("erk", "pruneforge_erk.allocator:ERK")
