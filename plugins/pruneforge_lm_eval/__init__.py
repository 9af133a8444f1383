"""Language model tasks through lm-eval."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluators."""
    registry.evaluator("lm-eval", "pruneforge_lm_eval.evaluator:LMEval", library="lm_eval", extra="eval")
    registry.evaluator("zero-shot-7", "pruneforge_lm_eval.evaluator:ZeroShot7", library="lm_eval", extra="eval")
