"""Sweeps: studies of a model, or of several of one shape, over all sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.patterns import NM, parse_pattern
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.loading import load_model
from pruneforge.runs.method import make_pattern
from pruneforge.runs.parts import make_metric
from pruneforge.runs.plan import split_excluded
from pruneforge.studies.asked import study_values
from pruneforge.studies.study import Study, StudyModel, make_study

PATTERNS = ("1:4", "2:4", "4:8")
"""N:M patterns beside the curve, where nothing else is asked for."""

MOST_SPARSITIES = 1_000
"""Sparsities of a sweep; each is a run."""


@dataclass(frozen=True)
class Sweep:
    """A sweep, ready to run.

    Attributes:
        study: Its cells.
        shapes: The shape (out, in) of each layer, by name; the models' are the same.
        left_out: Patterns that are not among its cells because they do not fit, and why.
    """

    study: Study
    shapes: dict[str, tuple[int, int]]
    left_out: dict[str, str]

    @property
    def sparsities(self) -> list[float]:
        """The sparsities of the curves."""
        return [pattern for pattern in self.study.patterns if not isinstance(pattern, str)]


def sparsities_between(start: float, stop: float, step: float) -> list[float]:
    """Return the sparsities from `start` to `stop`, exact decimals; without 0, which is the dense model itself.

    Raises:
        PruneForgeError: There are none.
    """
    for name, value in (("start", start), ("stop", stop)):
        if not 0 <= value < 1:
            raise PruneForgeError(f"`{name}` {value} is outside [0, 1); it is a share of weights to prune")
    if start > stop:
        raise PruneForgeError(f"`start` {start} is above `stop` {stop}; a sweep goes from small to large sparsities")
    if not 0 < step < 1:
        raise PruneForgeError(f"`step` {step} must lie between 0 and 1, such as 0.05")
    first, last, each = (Fraction(repr(float(value))) for value in (start, stop, step))
    count = int((last - first) / each) + 1
    if count > MOST_SPARSITIES:
        raise PruneForgeError(f"`step` {step} makes {count:,} sparsities, and a sweep has {MOST_SPARSITIES:,} at most")
    found = [float(first + number * each) for number in range(count)]
    if found[-1] == 0:
        raise PruneForgeError(f"a sweep from {start} to {stop} by {step} prunes nothing; end it above 0")
    return [sparsity for sparsity in found if sparsity > 0]


def make_sweep(
    models: Sequence[str],
    metrics: Sequence[str],
    task: Mapping[str, Any],
    sparsities: Sequence[float],
    patterns: Sequence[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Sweep:
    """Return a sweep of models over sparsities.

    Args:
        models: Folders or hub ids. Several must have the same layers; what they lose is compared then.
        metrics: Names of metrics.
        task: What each pruned model is evaluated on: `task` and its `options`.
        sparsities: The sparsities.
        patterns: N:M patterns beside them; by default those of `PATTERNS` that fit every layer and metric.
        options: Options of the metric; of several metrics, by name.
        settings: Settings of the recipe for models or metrics, and `seeds`, `controls` and `device` of a study.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit.
    """
    given = {"seeds": [0], "details": False, **settings}  # details of each sparsity would slow it down
    values = study_values(models, metrics, task, sparsities, options, keep_masks=len(models) > 1, **given)
    study = make_study(values, "sweep")
    registry = loaded_plugins().registry
    made = [make_metric(method.metric, method.options, registry) for method in study.methods.values()]
    shapes = _shapes(study)
    chosen, left_out = _fitting(patterns, made, shapes)
    study = study.model_copy(update={"patterns": [*study.patterns, *chosen]})
    return Sweep(study, shapes, left_out)


def _shapes(study: Study) -> dict[str, tuple[int, int]]:
    """Return the shapes of the layers, which all models share."""
    (first, shapes), *others = ((name, _shapes_of(name, model)) for name, model in study.models.items())
    for name, other in others:
        if shapes != other:
            layer = sorted(shapes.items() ^ other.items())[0][0]
            raise PruneForgeError(
                f"models {first!r} and {name!r} cannot be swept together: layer {layer!r} differs in size or is in "
                "one; sweep each into a folder of its own"
            )
    return shapes


def _shapes_of(name: str, model: StudyModel) -> dict[str, tuple[int, int]]:
    try:
        loaded = load_model(
            model.model, model.dtype, None, loaded_plugins().registry, model.adapter_options, on_disk=True
        )
        blocks, _ = split_excluded(loaded.adapter.blocks(loaded.module), model.exclude)
    except PruneForgeError as error:
        raise PruneForgeError(f"model {name!r}: {error}") from error
    return {layer.name: layer.shape for block in blocks for layer in block.layers}


def _fitting(
    asked: Sequence[str] | None, metrics: Sequence[Metric], shapes: Mapping[str, tuple[int, int]]
) -> tuple[list[str], dict[str, str]]:
    """Return the N:M patterns that every layer and metric takes, and why others are left out; asked ones must fit."""
    left_out: dict[str, str] = {}
    patterns = list(dict.fromkeys(PATTERNS if asked is None else asked))
    for text in patterns:
        try:
            pattern = parse_pattern(None, text, "row")
            if not isinstance(pattern, NM):
                raise PruneForgeError(f"pattern {text!r} is not N:M, such as 2:4; sparsities are those of the sweep")
            for metric in metrics:
                make_pattern(metric, None, text)
            for layer, (_, in_features) in shapes.items():
                pattern.check(layer, in_features)
        except PruneForgeError as error:
            if asked is not None:
                raise
            left_out[text] = str(error).partition(";")[0]
    return [text for text in patterns if text not in left_out], left_out
