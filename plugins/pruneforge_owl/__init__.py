"""The OWL allocator."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `owl`."""
    registry.allocator("owl", "pruneforge_owl.allocator:OWL")
