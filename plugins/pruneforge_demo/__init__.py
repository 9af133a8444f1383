"""Demos: small trained checkpoints and real data that ship with PruneForge, so that they need no network."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the demos and their data."""
    registry.demo("text", "pruneforge_demo.text:TextDemo")
    registry.demo("image", "pruneforge_demo.image:ImageDemo")
    registry.source("digits", "pruneforge_demo.image:Digits", library="sklearn", extra="demo")
    registry.source("python-docs", "pruneforge_demo.text:PythonDocs")
