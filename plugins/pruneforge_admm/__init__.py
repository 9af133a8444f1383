"""ADMM: pruning by layer-wise reconstruction, with weights and mask found in turns."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("admm", "pruneforge_admm.metric:ADMM")
