"""Reasoning under compression: questions answered step by step, whether right, and the tokens that it took."""

from pruneforge import Registry, hookimpl


@hookimpl
def pruneforge_register(registry: Registry) -> None:
    """Register the evaluator, and the sources of questions."""
    registry.evaluator("reasoning", "pruneforge_reasoning.evaluator:Reasoning")
    registry.source("aime-2024", "pruneforge_reasoning.hub:AIME2024")
    registry.source("folio", "pruneforge_reasoning.hub:FOLIO")
    registry.source("temporal-sequences", "pruneforge_reasoning.hub:TemporalSequences")
    registry.source("musique", "pruneforge_reasoning.hub:MuSiQue")
    registry.source("questions", "pruneforge_reasoning.files:QuestionFile")
    registry.source("sums", "pruneforge_reasoning.sums:Sums")
