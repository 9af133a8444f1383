"""SparseGPT: pruning by layer-wise reconstruction."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("sparsegpt", "pruneforge_sparsegpt.metric:SparseGPT")
