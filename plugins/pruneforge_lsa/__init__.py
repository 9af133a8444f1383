"""The LSA allocator."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `lsa`."""
    registry.allocator("lsa", "pruneforge_lsa.allocator:LSA")
