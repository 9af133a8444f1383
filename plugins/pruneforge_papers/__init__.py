"""Published numbers, and studies that measure them again or ask the same on models that need no network."""

from pruneforge import Registry, hookimpl

OFFLINE = ("demo", "sparsity-sweep", "nm", "norm-ablation", "alpha-ablation", "samples-ablation")
"""Studies of the demo's models, of minutes."""

FROM_THE_HUB = ("gblm-table1", "gblm-nm", "wanda-table", "opt", "qwen3", "vit-table", "source-ablation")
"""Studies of models and data that are downloaded."""

LOCAL = ("methods",)
"""Studies of models and data in folders, which their texts name."""


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the studies and the numbers."""
    for name in (*OFFLINE, *FROM_THE_HUB, *LOCAL):
        registry.study(name, f"pruneforge_papers:studies/{name}.yaml")
    registry.published("pruneforge_papers:published.yaml")
