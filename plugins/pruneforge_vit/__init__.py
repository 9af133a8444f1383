"""Vision transformers of the transformers library."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("vit", "pruneforge_vit.adapter:ViT")
