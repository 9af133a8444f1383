"""Allocators that look at no model: uniform, and from a file."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register `uniform` and `file`."""
    registry.allocator("uniform", "pruneforge_uniform.allocators:Uniform")
    registry.allocator("file", "pruneforge_uniform.allocators:FromFile")
