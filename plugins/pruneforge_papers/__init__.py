"""Published numbers, and the studies that find them again."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the numbers."""
    registry.published("pruneforge_papers:published.yaml")
