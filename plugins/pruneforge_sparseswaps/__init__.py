"""The SparseSwaps refiner."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `sparseswaps`."""
    registry.refiner("sparseswaps", "pruneforge_sparseswaps.refiner:SparseSwaps")
