"""SparseGPT: pruning by layer-wise reconstruction."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric, and the refiner that updates weights under a given mask."""
    registry.metric("sparsegpt", "pruneforge_sparsegpt.metric:SparseGPT")
    registry.refiner("sparsegpt", "pruneforge_sparsegpt.refiner:SparseGPT")
