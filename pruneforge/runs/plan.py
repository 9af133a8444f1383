"""From what a user asks for to what the engine runs: recipe, metric, pattern, layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.patterns import NM, Pattern, parse_pattern
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.registry import Registry
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import GradientStatistic, InputStatistic
from pruneforge.runs.recipe_file import validated

Metrics = str | Metric | Sequence[str | Metric] | Mapping[str, str | Metric]
"""One metric or several: by name or made, in a list or by a label of the user's."""


def by_label(metric: Metrics) -> dict[str, str | Metric]:
    """Return metrics by what the user calls them: a label, or else their names.

    Raises:
        PruneForgeError: There is none, or a name comes twice.
    """
    if isinstance(metric, str | Metric):
        metric = [metric]
    if isinstance(metric, Mapping):
        labelled = dict(metric)
    else:
        labelled = {}
        for each in metric:
            label = each if isinstance(each, str) else each.name
            if label in labelled:
                raise PruneForgeError(f"metric {label!r} is asked for twice; give each a label, as a mapping")
            labelled[label] = each
    if not labelled:
        raise PruneForgeError("no metric is asked for")
    for label in labelled:
        if not re.fullmatch(r"[\w.+-]+", label):
            raise PruneForgeError(f"label {label!r} of a metric cannot be part of a folder's name")
    return labelled


def options_by_label(labels: Iterable[str], options: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """Return the options of each of several plugins: those of one plainly, those of several by label.

    Raises:
        PruneForgeError: Options of several are not a mapping by label.
    """
    names = list(labels)
    if len(names) == 1:
        return {names[0]: dict(options)}
    for name, value in options.items():
        if name not in names:
            raise unknown_name(f"{what} in options of several (write {what.upper()}: OPTIONS):", name, names)
        if not isinstance(value, Mapping):
            raise PruneForgeError(f"options of {name!r} must be a mapping of names to values, not {value!r}")
    return {name: dict(options.get(name, {})) for name in names}


def make_metric(metric: str | Metric, options: Mapping[str, Any] | None, registry: Registry) -> Metric:
    """Return the metric of a name, with its options; a `Metric` is returned as it is.

    Raises:
        PruneForgeError: No metric has that name, it has no such option, or it requires what nothing feeds.
    """
    if not isinstance(metric, str) and options:
        raise PruneForgeError("options need a metric's name; give a Metric its options when you make it")
    made = registry.create("metric", metric, options) if isinstance(metric, str) else metric
    for kind in made.requires:
        if not issubclass(kind, InputStatistic | GradientStatistic):
            raise PruneForgeError(
                f"metric {made.name!r} requires {kind.__name__}, which is neither an InputStatistic nor a "
                "GradientStatistic, so nothing would feed it"
            )
    return made


def make_pattern(metric: Metric, sparsity: float | None, pattern: str | None, propagate: str) -> Pattern:
    """Return the pattern asked for, with the metric's scope.

    Raises:
        PruneForgeError: Sparsity, pattern, scope and propagation contradict one another.
    """
    scope = metric.comparison_group()
    asked = parse_pattern(sparsity, pattern, scope or "layer")
    chosen = getattr(metric.options, "scope", None)
    if isinstance(asked, NM) and chosen is not None:
        raise PruneForgeError(f"scope={chosen} does not go with pattern {asked}, which compares within groups")
    if getattr(asked, "scope", None) == "model" and propagate == "pruned" and sees_activations(metric):
        raise PruneForgeError(
            "scope=model compares scores of all blocks, so none can be pruned before the last is calibrated; "
            "add `propagate` dense"
        )
    return asked


def sees_activations(metric: Metric) -> bool:
    """Return whether a metric's scores depend on how earlier blocks were pruned."""
    return any(issubclass(kind, InputStatistic) for kind in metric.requires)


def make_run(recipe: PruneRecipe, metric: Metric, folder: Path | None) -> Run:
    """Return the run that a recipe asks for.

    Raises:
        PruneForgeError: Sparsity, pattern, scope and propagation contradict one another.
    """
    return Run(recipe, metric, make_pattern(metric, recipe.sparsity, recipe.pattern, recipe.propagate), folder)


def make_runs(
    recipes: Mapping[str, PruneRecipe], metrics: Mapping[str, Metric], patterns: Sequence[float | str], folder: Path
) -> list[Run]:
    """Return a run for each metric and pattern, with a folder of its own below `folder`.

    Args:
        recipes: The settings with each metric, by label.
        metrics: The metrics, by label.
        patterns: Sparsities and "N:M".
        folder: Its folders are called "0.5" or "2of4", after the label if there are several metrics.

    Raises:
        PruneForgeError: There is none, one comes twice, or they would share nothing.
    """
    several = len(metrics) * len(patterns) > 1
    runs: dict[str, Run] = {}
    for label, metric in metrics.items():
        recipe = recipes[label]
        if several and recipe.propagate == "pruned" and sees_activations(metric):
            raise PruneForgeError(
                "with pruned propagation each run changes what the next block sees, so several share nothing; "
                "add `propagate` dense, or make a run for each"
            )
        for asked in patterns:
            sparsity, text = (None, asked) if isinstance(asked, str) else (asked, None)
            own = validated(PruneRecipe, **{**recipe.model_dump(), "sparsity": sparsity, "pattern": text})
            run = make_run(own, metric, None)
            pattern = str(run.pattern).replace(":", "of")
            name = pattern if len(metrics) == 1 else f"{label}-{pattern}"
            if name in runs:
                raise PruneForgeError(f"pattern {run.pattern} is asked for twice")
            run.folder = folder / name
            runs[name] = run
    if not runs:
        raise PruneForgeError("no pattern is asked for; name at least one, such as 0.5 or 2:4")
    return list(runs.values())


def split_excluded(blocks: list[Block], exclude: Sequence[str]) -> tuple[list[Block], list[Layer]]:
    """Return the blocks without the layers that `exclude` names with wildcards, and those layers.

    Raises:
        PruneForgeError: A pattern matches no layer, or all layers.
    """
    layers = [layer for block in blocks for layer in block.layers]
    for glob in exclude:
        if not any(fnmatchcase(layer.name, glob) for layer in layers):
            raise PruneForgeError(f"exclude={glob!r} matches no layer; layers have names such as {layers[0].name!r}")
    out = {layer.name for layer in layers if any(fnmatchcase(layer.name, glob) for glob in exclude)}
    if len(out) == len(layers):
        raise PruneForgeError(f"exclude={', '.join(exclude)} leaves no layer to prune")
    kept = [replace(block, layers=tuple(la for la in block.layers if la.name not in out)) for block in blocks]
    return kept, [layer for layer in layers if layer.name in out]
