"""Perplexity by the published protocol."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluator."""
    registry.evaluator("perplexity", "pruneforge_perplexity.evaluator:Perplexity")
