"""Vision transformers of transformers."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("vit", "pruneforge_vit.adapter:ViT")
