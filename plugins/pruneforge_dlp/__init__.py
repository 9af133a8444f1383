"""The DLP allocator."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `dlp`."""
    registry.allocator("dlp", "pruneforge_dlp.allocator:DLP")
