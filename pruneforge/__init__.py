"""One-shot pruning of transformers: metrics and architectures as plugins, one loop for all of them.

The names below are imported when they are first used, so that `import pruneforge` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruneforge.checkpoint.reader import Checkpoint as Checkpoint
    from pruneforge.data.image_classifier import ImageClassifier as ImageClassifier
    from pruneforge.data.images import ImageProcessor as ImageProcessor
    from pruneforge.data.images import ImageSet as ImageSet
    from pruneforge.data.images import ImageSource as ImageSource
    from pruneforge.data.text import TextSource as TextSource
    from pruneforge.errors import PruneForgeError as PruneForgeError
    from pruneforge.interfaces.adapter import Adapter as Adapter
    from pruneforge.interfaces.adapter import Block as Block
    from pruneforge.interfaces.adapter import Example as Example
    from pruneforge.interfaces.adapter import LoadedModel as LoadedModel
    from pruneforge.interfaces.adapter import Skeleton as Skeleton
    from pruneforge.interfaces.allocator import Allocator as Allocator
    from pruneforge.interfaces.allocator import Trials as Trials
    from pruneforge.interfaces.batch import Batch as Batch
    from pruneforge.interfaces.demo import Demo as Demo
    from pruneforge.interfaces.evaluator import Evaluator as Evaluator
    from pruneforge.interfaces.evaluator import Subject as Subject
    from pruneforge.interfaces.hookspecs import hookimpl as hookimpl
    from pruneforge.interfaces.layer import Layer as Layer
    from pruneforge.interfaces.layer import PointwiseConvLayer as PointwiseConvLayer
    from pruneforge.interfaces.layer import SlicedLayer as SlicedLayer
    from pruneforge.interfaces.layer import TransposedLayer as TransposedLayer
    from pruneforge.interfaces.layer import find_layers as find_layers
    from pruneforge.interfaces.metric import Metric as Metric
    from pruneforge.interfaces.metric import Pruned as Pruned
    from pruneforge.interfaces.objective import Objective as Objective
    from pruneforge.interfaces.observer import Observer as Observer
    from pruneforge.interfaces.options import Options as Options
    from pruneforge.interfaces.patterns import NM as NM
    from pruneforge.interfaces.patterns import Pattern as Pattern
    from pruneforge.interfaces.patterns import Unstructured as Unstructured
    from pruneforge.interfaces.products import Product as Product
    from pruneforge.interfaces.recipe import PruneRecipe as PruneRecipe
    from pruneforge.interfaces.recovery import ModelSite as ModelSite
    from pruneforge.interfaces.recovery import Passing as Passing
    from pruneforge.interfaces.recovery import Recovery as Recovery
    from pruneforge.interfaces.recovery import Site as Site
    from pruneforge.interfaces.refiner import Refiner as Refiner
    from pruneforge.interfaces.registry import Registry as Registry
    from pruneforge.interfaces.run import BlockResult as BlockResult
    from pruneforge.interfaces.run import Run as Run
    from pruneforge.interfaces.shares import proportional as proportional
    from pruneforge.interfaces.shares import spread as spread
    from pruneforge.interfaces.source import Request as Request
    from pruneforge.interfaces.source import Source as Source
    from pruneforge.interfaces.statistics import BlockGradientStatistic as BlockGradientStatistic
    from pruneforge.interfaces.statistics import GradientStatistic as GradientStatistic
    from pruneforge.interfaces.statistics import InputStatistic as InputStatistic
    from pruneforge.interfaces.statistics import LayerStatistics as LayerStatistics
    from pruneforge.interfaces.statistics import On as On
    from pruneforge.interfaces.statistics import OutputStatistic as OutputStatistic
    from pruneforge.interfaces.statistics import Statistic as Statistic
    from pruneforge.interfaces.summaries import ColumnMoments as ColumnMoments
    from pruneforge.interfaces.summaries import ColumnSquares as ColumnSquares
    from pruneforge.interfaces.summaries import ColumnSums as ColumnSums
    from pruneforge.interfaces.summaries import Covariance as Covariance
    from pruneforge.interfaces.summaries import GradientMagnitude as GradientMagnitude
    from pruneforge.interfaces.summaries import GradientSquares as GradientSquares
    from pruneforge.interfaces.summaries import GradientSum as GradientSum
    from pruneforge.interfaces.summaries import Gram as Gram
    from pruneforge.interfaces.summaries import OutputSquares as OutputSquares
    from pruneforge.plugins import create as create
    from pruneforge.runs.apply import apply as apply
    from pruneforge.runs.estimate import Estimate as Estimate
    from pruneforge.runs.estimate import estimate as estimate
    from pruneforge.runs.estimate import estimate_each as estimate_each
    from pruneforge.runs.evaluate import evaluate as evaluate
    from pruneforge.runs.inspect import diff as diff
    from pruneforge.runs.inspect import inspect as inspect
    from pruneforge.runs.prune import load as load
    from pruneforge.runs.prune import prune as prune
    from pruneforge.runs.prune import prune_each as prune_each
    from pruneforge.runs.recover import recover as recover
    from pruneforge.runs.result import PruneResult as PruneResult
    from pruneforge.runs.zeros import KeptZeros as KeptZeros
    from pruneforge.runs.zeros import check_zeros as check_zeros
    from pruneforge.runs.zeros import keep_zeros as keep_zeros
    from pruneforge.runs.zeros import merge_under_masks as merge_under_masks
    from pruneforge.studies.compare import compare as compare
    from pruneforge.studies.push import push as push

_MODULES = {
    "checkpoint.reader": ("Checkpoint",),
    "data.image_classifier": ("ImageClassifier",),
    "data.images": ("ImageProcessor", "ImageSet", "ImageSource"),
    "data.text": ("TextSource",),
    "errors": ("PruneForgeError",),
    "interfaces.adapter": ("Adapter", "Block", "Example", "LoadedModel", "Skeleton"),
    "interfaces.allocator": ("Allocator", "Trials"),
    "interfaces.batch": ("Batch",),
    "interfaces.demo": ("Demo",),
    "interfaces.evaluator": ("Evaluator", "Subject"),
    "interfaces.hookspecs": ("hookimpl",),
    "interfaces.layer": ("Layer", "PointwiseConvLayer", "SlicedLayer", "TransposedLayer", "find_layers"),
    "interfaces.metric": ("Metric", "Pruned"),
    "interfaces.objective": ("Objective",),
    "interfaces.observer": ("Observer",),
    "interfaces.options": ("Options",),
    "interfaces.patterns": ("NM", "Pattern", "Unstructured"),
    "interfaces.products": ("Product",),
    "interfaces.recipe": ("PruneRecipe",),
    "interfaces.recovery": ("ModelSite", "Passing", "Recovery", "Site"),
    "interfaces.refiner": ("Refiner",),
    "interfaces.registry": ("Registry",),
    "interfaces.run": ("BlockResult", "Run"),
    "interfaces.shares": ("proportional", "spread"),
    "interfaces.source": ("Request", "Source"),
    "interfaces.statistics": (
        "BlockGradientStatistic",
        "GradientStatistic",
        "InputStatistic",
        "LayerStatistics",
        "On",
        "OutputStatistic",
        "Statistic",
    ),
    "interfaces.summaries": (
        "ColumnMoments",
        "ColumnSquares",
        "ColumnSums",
        "Covariance",
        "GradientMagnitude",
        "GradientSquares",
        "GradientSum",
        "Gram",
        "OutputSquares",
    ),
    "plugins": ("create",),
    "runs.apply": ("apply",),
    "runs.estimate": ("Estimate", "estimate", "estimate_each"),
    "runs.evaluate": ("evaluate",),
    "runs.inspect": ("diff", "inspect"),
    "runs.prune": ("load", "prune", "prune_each"),
    "runs.recover": ("recover",),
    "runs.result": ("PruneResult",),
    "runs.zeros": ("KeptZeros", "check_zeros", "keep_zeros", "merge_under_masks"),
    "studies.compare": ("compare",),
    "studies.push": ("push",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
