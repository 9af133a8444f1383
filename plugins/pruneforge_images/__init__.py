"""Image sources: folders, archives, and image data sets of the Hub."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the sources."""
    registry.source("images", "pruneforge_images.files:ImageFiles")
    registry.source("imagenet", "pruneforge_images.hub:ImageHub")
