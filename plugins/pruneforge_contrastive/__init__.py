"""Contrastive learning: a loss for encoders that embed texts, and pairs of texts for it."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the objective and the source."""
    registry.objective("contrastive", "pruneforge_contrastive.objective:Contrastive")
    registry.source("pairs", "pruneforge_contrastive.pairs:Pairs")
