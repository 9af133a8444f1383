"""The AlphaPruning allocator."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `alphapruning`."""
    registry.allocator("alphapruning", "pruneforge_alphapruning.allocator:AlphaPruning")
