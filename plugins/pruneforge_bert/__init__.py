"""Encoders of text of BERT's block shape, with a masked language model or classification head, or without."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("bert", "pruneforge_bert.adapter:BERT")
