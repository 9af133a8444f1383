"""Perplexity by the published protocol."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluator."""
    registry.evaluator("perplexity", "pruneforge_perplexity.evaluator:Perplexity")
