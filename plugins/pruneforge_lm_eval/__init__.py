"""Language model tasks through lm-eval."""

from pruneforge.hookspecs import hookimpl
from pruneforge.registry import Registry


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluators."""
    registry.evaluator("lm-eval", "pruneforge_lm_eval.evaluator:LMEval")
    registry.evaluator("zero-shot-7", "pruneforge_lm_eval.evaluator:ZeroShot7")
