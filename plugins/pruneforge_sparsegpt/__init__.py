"""SparseGPT: pruning by layer-wise reconstruction."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("sparsegpt", "pruneforge_sparsegpt.metric:SparseGPT")
