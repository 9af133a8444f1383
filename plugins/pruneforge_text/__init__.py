"""Text sources: the published calibration sets, any text data set of the Hub, and local files."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the sources."""
    registry.source("c4", "pruneforge_text.hub:C4")
    registry.source("wikitext2", "pruneforge_text.hub:WikiText2")
    registry.source("ptb", "pruneforge_text.hub:PTB")
    registry.source("hub", "pruneforge_text.hub:Hub")
    registry.source("text", "pruneforge_text.files:TextFile")
