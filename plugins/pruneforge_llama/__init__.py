"""Causal language models of LLaMA's block shape."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("llama", "pruneforge_llama.adapter:Llama")
