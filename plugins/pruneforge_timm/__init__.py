"""Image classifiers of timm."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("timm", "pruneforge_timm.adapter:Timm")
