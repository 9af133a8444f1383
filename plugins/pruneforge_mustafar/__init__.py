"""Mustafar: key-value caches whose tokens are pruned once they leave a recent window (Joo et al., 2025)."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluator."""
    registry.evaluator("kv-perplexity", "pruneforge_mustafar.evaluator:CachePerplexity")
