"""The DSnoT refiner."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `dsnot`."""
    registry.refiner("dsnot", "pruneforge_dsnot.refiner:DSnoT")
