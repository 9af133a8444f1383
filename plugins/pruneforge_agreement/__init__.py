"""Agreement of a pruned model with the dense one."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluator."""
    registry.evaluator("agreement", "pruneforge_agreement.evaluator:Agreement")
