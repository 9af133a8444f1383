"""The embedded default: a small trained checkpoint and real data, so that everything runs without a network."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the demos and their data."""
    registry.demo("text", "pruneforge_demo.text:TextDemo")
    registry.demo("image", "pruneforge_demo.image:ImageDemo")
    registry.source("digits", "pruneforge_demo.image:Digits", library="sklearn", extra="demo")
    registry.source("python-docs", "pruneforge_demo.text:PythonDocs")
