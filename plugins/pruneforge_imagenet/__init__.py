"""Top-1 and top-5 accuracy of image classifiers."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluator."""
    registry.evaluator("imagenet", "pruneforge_imagenet.evaluator:ImageNet")
