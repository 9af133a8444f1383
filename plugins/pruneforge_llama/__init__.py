"""Causal language models of LLaMA's block shape."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("llama", "pruneforge_llama.adapter:Llama")
