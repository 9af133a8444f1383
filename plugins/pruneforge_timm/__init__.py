"""Image classifiers of timm."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("timm", "pruneforge_timm.adapter:Timm")
