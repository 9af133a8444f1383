"""The random metric, a control."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `random`."""
    registry.metric("random", "pruneforge_random.metric:Random")
