"""A search for the sparsities of blocks."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `search`."""
    registry.allocator("search", "pruneforge_search.allocator:Search", library="optuna", extra="search")
