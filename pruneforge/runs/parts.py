"""The parts of methods as a user names them: a metric and what goes with it, by name or made, with their options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn

from pruneforge.data.calibration import Data
from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces.allocator import Allocator
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.recovery import Recovery, Targets, recovers_blocks, recovers_models
from pruneforge.interfaces.refiner import Refiner
from pruneforge.interfaces.registry import Registry
from pruneforge.interfaces.statistics import (
    GradientStatistic,
    InputStatistic,
    OutputStatistic,
    Requirement,
    Statistic,
    kind_of,
)
from pruneforge.plugins import Plugins
from pruneforge.runs.method import Method
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
    for label in labelled if len(labelled) > 1 else ():
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


def make_metric(metric: str | Metric, options: Mapping[str, Any], registry: Registry) -> Metric:
    """Return the metric of a name, with its options; a `Metric` is returned as it is.

    Raises:
        PruneForgeError: No metric has that name, it has no such option, or it requires what nothing feeds.
    """
    made: Metric = _made("metric", metric, options, registry)
    _check_requires("metric", made.name, made.requires)
    return made


def make_allocator(asked: str | Allocator | None, options: Mapping[str, Any], registry: Registry) -> Allocator | None:
    """Return the allocator of a name, with its options; an `Allocator` is returned as it is.

    Raises:
        PruneForgeError: As `make_metric` does, or there are options and no allocator.
    """
    made: Allocator | None = _optional("allocator", asked, options, registry)
    if made is not None:
        _check_requires("allocator", made.name, made.requires, (InputStatistic, OutputStatistic))
    return made


def make_recovery(asked: str | Recovery | None, options: Mapping[str, Any], registry: Registry) -> Recovery | None:
    """Return the recovery of a name, with its options; a `Recovery` is returned as it is.

    Raises:
        PruneForgeError: As `make_metric` does, or there are options and no recovery.
    """
    made: Recovery | None = _optional("recovery", asked, options, registry)
    if made is not None:
        if not recovers_blocks(made) and not recovers_models(made):
            raise PruneForgeError(f"recovery {made.name!r} defines neither `recover_block` nor `recover_model`")
        _check_requires("recovery", made.name, made.requires)
        if made.targets not in (None, *get_args(Targets)):
            raise PruneForgeError(
                f"recovery {made.name!r} has the targets {made.targets!r}; they must be None or one of "
                f"{', '.join(get_args(Targets))}"
            )
    return made


def make_objective(asked: str | Objective | None, options: Mapping[str, Any], registry: Registry) -> Objective | None:
    """Return the objective of a name, with its options; an `Objective` is returned as it is.

    Raises:
        PruneForgeError: As `make_metric` does, or there are options and no objective.
    """
    made: Objective | None = _optional("objective", asked, options, registry)
    return made


def _optional(kind: str, asked: Any, options: Mapping[str, Any], registry: Registry) -> Any:
    """Return the plugin that a setting asks for, or `None`."""
    setting = "recover" if kind == "recovery" else kind
    if asked is None and options:
        raise PruneForgeError(f"{setting} options need the name of what they belong to; add `{setting}`")
    return None if asked is None else _made(kind, asked, options, registry)


def make_refiners(
    refiners: Sequence[str | Refiner], options: Mapping[str, Any], registry: Registry
) -> tuple[Refiner, ...]:
    """Return the refiners of some names, with their options; a `Refiner` is returned as it is.

    Raises:
        PruneForgeError: As `make_metric` does, or there are options and no refiner.
    """
    if not refiners:
        if options:
            raise PruneForgeError("refine options need a refiner; name it with `refine`")
        return ()
    names = [refiner if isinstance(refiner, str) else refiner.name for refiner in refiners]
    of_each = options_by_label(names, options, "refiner")
    made = tuple(_made("refiner", each, of_each[name], registry) for each, name in zip(refiners, names, strict=True))
    for refiner in made:
        _check_requires("refiner", refiner.name, refiner.requires)
    return made


def _made(kind: str, asked: Any, options: Mapping[str, Any], registry: Registry) -> Any:
    """Return the plugin of a name, or one that is made already."""
    if isinstance(asked, str):
        return registry.create(kind, asked, options)
    if options:
        raise PruneForgeError(f"options need the name of a {kind}; give {asked.name!r} its options when you make it")
    return asked


_FED = (InputStatistic, OutputStatistic, GradientStatistic)


def _check_requires(
    kind: str, name: str, requires: Sequence[Requirement], fed: tuple[type[Statistic], ...] = _FED
) -> None:
    """Raise if something requires a statistic that nothing feeds."""
    for required in requires:
        if not issubclass(kind_of(required), fed):
            raise PruneForgeError(
                f"{kind} {name!r} requires {required.__name__}, which is not one of "
                f"{', '.join(base.__name__ for base in fed)}, so nothing would feed it"
            )


def make_methods(
    model: str | Path | nn.Module,
    metric: Metrics,
    calibration: Data | None,
    streams: Mapping[str, Data],
    settings: dict[str, Any],
    installed: Plugins,
) -> tuple[dict[str, PruneRecipe], dict[str, Method]]:
    """Return the recipe and the method of each metric, by label.

    Raises:
        PruneForgeError: A setting, a name or an option is wrong.
    """
    registry, options = installed.registry, settings.pop("options", {})
    asked_parts = {name: settings.pop(name, None) for name in ("allocator", "refine", "recover", "objective")}
    part_options = {name: dict(settings.pop(f"{name}_options", {})) for name in asked_parts}
    if isinstance(asked_parts["refine"], str | Refiner):
        asked_parts["refine"] = [asked_parts["refine"]]
    allocator = make_allocator(asked_parts["allocator"], part_options["allocator"], registry)
    refiners = make_refiners(asked_parts["refine"] or (), part_options["refine"], registry)
    recovery = make_recovery(asked_parts["recover"], part_options["recover"], registry)
    objective = make_objective(asked_parts["objective"], part_options["objective"], registry)
    made = {"allocator": allocator, "recover": recovery, "objective": objective}
    entries = described(asked_parts, made, part_options)
    entries |= _described_refiners(asked_parts["refine"] or (), refiners, part_options["refine"])
    named = by_label(metric)
    recipes: dict[str, PruneRecipe] = {}
    methods: dict[str, Method] = {}
    for label, own_options in options_by_label(named, options, "metric").items():
        asked = named[label]
        method = methods[label] = Method(
            make_metric(asked, own_options, registry), allocator, refiners, recovery, objective
        )
        recipes[label] = validated(
            PruneRecipe,
            model=str(model) if isinstance(model, str | Path) else type(model).__name__,
            metric=asked if isinstance(asked, str) else asked.name,
            calibration=str(calibration) if isinstance(calibration, str | Path) else None,
            streams={name: str(data) for name, data in streams.items() if isinstance(data, str | Path)},
            options=_options_of(method.metric, asked, own_options),
            plugins=[plugin.origin for plugin in installed.loaded if plugin.from_file],
            **entries,
            **settings,
        )
    return recipes, methods


def _options_of(part: Configurable, asked: str | Configurable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part's options as a recipe holds them, in their own types: those given, or all of an object."""
    values: dict[str, Any] = part.options.model_dump(mode="json")
    return {name: values[name] for name in given} if isinstance(asked, str) else values


def described(
    asked: Mapping[str, Any], made: Mapping[str, Configurable | None], options: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the entries of parts in a recipe: the name and the options of each, by the setting that asks for it."""
    entries: dict[str, Any] = {}
    for name, part in made.items():
        spec = asked[name]
        entries[name] = spec if part is None or isinstance(spec, str) else part.name
        entries[f"{name}_options"] = {} if part is None else _options_of(part, spec, options[name])
    return entries


def _described_refiners(
    specs: Sequence[str | Refiner], refiners: Sequence[Refiner], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the recipe's entries of refiners."""
    names = [spec if isinstance(spec, str) else spec.name for spec in specs]
    given = options_by_label(names, options, "refiner") if names else {}
    of_each = {
        name: _options_of(refiner, spec, given[name])
        for name, refiner, spec in zip(names, refiners, specs, strict=True)
    }
    chosen = next(iter(of_each.values())) if len(names) == 1 else {name: each for name, each in of_each.items() if each}
    return {"refine": names, "refine_options": chosen}
