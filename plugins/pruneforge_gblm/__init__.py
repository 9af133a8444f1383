"""GBLM-Pruner: gradients in the score."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("gblm", "pruneforge_gblm.metric:GBLM")
