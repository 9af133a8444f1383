"""One-shot pruning of transformers: metrics and architectures as plugins, one loop for all of them.

The names below are imported when they are first used, so that `import pruneforge` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruneforge.adapter import Adapter as Adapter
    from pruneforge.adapter import Block as Block
    from pruneforge.batch import Batch as Batch
    from pruneforge.comparing import Case as Case
    from pruneforge.comparing import compare as compare
    from pruneforge.demo import Demo as Demo
    from pruneforge.errors import PruneForgeError as PruneForgeError
    from pruneforge.estimate import Estimate as Estimate
    from pruneforge.estimate import estimate as estimate
    from pruneforge.evaluating import evaluate as evaluate
    from pruneforge.evaluator import Evaluator as Evaluator
    from pruneforge.hookspecs import hookimpl as hookimpl
    from pruneforge.images import ImageSource as ImageSource
    from pruneforge.layer import Layer as Layer
    from pruneforge.metric import Metric as Metric
    from pruneforge.metric import Pruned as Pruned
    from pruneforge.options import Options as Options
    from pruneforge.pruning import load as load
    from pruneforge.pruning import prune as prune
    from pruneforge.pruning import prune_each as prune_each
    from pruneforge.result import PruneResult as PruneResult
    from pruneforge.source import Source as Source
    from pruneforge.statistics import ColumnSquares as ColumnSquares
    from pruneforge.statistics import GradientMagnitude as GradientMagnitude
    from pruneforge.statistics import GradientSquares as GradientSquares
    from pruneforge.statistics import GradientStatistic as GradientStatistic
    from pruneforge.statistics import GradientSum as GradientSum
    from pruneforge.statistics import Gram as Gram
    from pruneforge.statistics import InputStatistic as InputStatistic
    from pruneforge.statistics import LayerStatistics as LayerStatistics
    from pruneforge.statistics import Statistic as Statistic
    from pruneforge.text import TextSource as TextSource

_MODULES = {
    "adapter": ("Adapter", "Block"),
    "batch": ("Batch",),
    "comparing": ("Case", "compare"),
    "demo": ("Demo",),
    "errors": ("PruneForgeError",),
    "estimate": ("Estimate", "estimate"),
    "evaluating": ("evaluate",),
    "evaluator": ("Evaluator",),
    "hookspecs": ("hookimpl",),
    "images": ("ImageSource",),
    "layer": ("Layer",),
    "metric": ("Metric", "Pruned"),
    "options": ("Options",),
    "pruning": ("load", "prune", "prune_each"),
    "result": ("PruneResult",),
    "source": ("Source",),
    "statistics": (
        "ColumnSquares",
        "GradientMagnitude",
        "GradientSquares",
        "GradientStatistic",
        "GradientSum",
        "Gram",
        "InputStatistic",
        "LayerStatistics",
        "Statistic",
    ),
    "text": ("TextSource",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
