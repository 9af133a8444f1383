"""GAPrune: two sets of data, one of a domain and one of everything else."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the metric."""
    registry.metric("gaprune", "pruneforge_gaprune.metric:GAPrune")
