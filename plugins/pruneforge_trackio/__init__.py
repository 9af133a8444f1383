"""Runs logged to Trackio."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the observer."""
    registry.observer("trackio", "pruneforge_trackio.observer:Trackio", library="trackio", extra="trackio")
