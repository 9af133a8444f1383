"""The SparseFW refiner."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `sparsefw`."""
    registry.refiner("sparsefw", "pruneforge_sparsefw.refiner:SparseFW")
