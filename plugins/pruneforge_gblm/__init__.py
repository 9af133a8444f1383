"""GBLM-Pruner: gradients in the score."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("gblm", "pruneforge_gblm.metric:GBLM")
