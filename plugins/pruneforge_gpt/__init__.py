"""Causal language models of GPT's block shape: GPT-2, OPT and their kin."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the adapter."""
    registry.adapter("gpt", "pruneforge_gpt.adapter:GPT")
