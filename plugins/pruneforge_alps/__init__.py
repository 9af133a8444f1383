"""ALPS: pruning by layer-wise reconstruction, with a penalty that grows until the support settles."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("alps", "pruneforge_alps.metric:ALPS")
