"""The RIA metric."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `ria`."""
    registry.metric("ria", "pruneforge_ria.metric:RIA")
