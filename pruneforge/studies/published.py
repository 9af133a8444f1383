"""Published numbers, which plugins ship, to stand beside what a study finds."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pruneforge.documents import parse_yaml
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.patterns import parse_pattern
from pruneforge.interfaces.recipe import LONGEST_DEFAULT, PruneRecipe
from pruneforge.interfaces.shipped import Shipped
from pruneforge.plugins import loaded_plugins
from pruneforge.studies.plan import Cell
from pruneforge.studies.study import OF_DATA

DENSE, NOTHING = "dense", 0.0
"""What published numbers call the model as it is: its method, and the sparsity that is its pattern."""

SEEN = (*OF_DATA, "propagate")
"""Settings of the recipe that decide what calibration sees."""

HARMLESS = frozenset({"amp", "data", "window", "workers"})
"""Options of a task that keep its protocol: `data` and `window` are compared, and the others say how it is computed."""


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        value: The number, in the unit of the evaluator: a share is between 0 and 1.
        model: What the publication calls the model.
        method: The names of a method's parts: `metric`, or `allocator + metric + refiner + recovery`; or `dense`.
        pattern: Sparsity or N:M; 0 for the dense model.
        measure: What the number is.
        window: Tokens that were evaluated at a time; `None` where that means nothing.
        source: The publication, and where it says so.
        task: The evaluator.
        data: Source of the evaluation data; `None` if the task implies them.
        images: Images that were evaluated; `None` where that means nothing.
        recipe: Settings of the recipe that say what calibration saw, as far as they are known.
        references: Hub ids of the model.
        second_hand: Whether the publication itself was not read; such a number does not stand beside a result.
    """

    value: float
    model: str
    method: str
    pattern: float | str
    measure: str
    window: int | None
    source: str
    task: str
    data: str | None
    references: tuple[str, ...]
    images: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    second_hand: bool = False


class PublishedTable(BaseModel):
    """Numbers of one publication that were measured alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="The publication, and where it says so.")
    task: str = Field(description="Name of the evaluator, or name:argument.")
    measure: str = Field(description="What the evaluator calls the number.")
    data: str | None = Field(None, description="Source of the evaluation data, if the task does not imply them.")
    window: int | None = Field(None, ge=1, description="Tokens that were evaluated at a time.")
    images: int | None = Field(None, ge=1, description="Images that were evaluated, if the task does not imply them.")
    recipe: dict[str, Any] = Field(
        default_factory=dict,
        description=f"What calibration saw, where it is known, as the recipe says it: {', '.join(SEEN)}.",
    )
    second_hand: bool = Field(False, description="Whether the publication itself was not read.")
    values: dict[str, dict[str, dict[float | str, float]]] = Field(
        description="The number of each model, method and pattern; the dense model has the sparsity 0."
    )


class PublishedFile(BaseModel):
    """What a file of published numbers holds. Of several numbers for one cell the first stands beside a result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, list[str]] = Field(description="Hub ids of each model.")
    tables: list[PublishedTable] = Field(description="Numbers, by publication and protocol.")

    @model_validator(mode="after")
    def _known(self) -> PublishedFile:
        """Check that models are declared, patterns are some, and settings say what calibration saw."""
        for table in self.tables:
            for name in table.recipe:
                if name not in SEEN:
                    raise ValueError(f"recipe: {name!r} is not one of {', '.join(SEEN)}")
            for model, methods in table.values.items():
                if model not in self.models:
                    raise ValueError(f"model {model!r} is not among the models")
                for method, values in methods.items():
                    for pattern in values:
                        _check_pattern(method, pattern)
        return self

    def numbers(self) -> list[Published]:
        """Return every number, in the order of the file."""
        return [
            Published(
                value=value,
                model=model,
                method=method,
                pattern=pattern,
                measure=table.measure,
                window=table.window,
                source=table.source,
                task=table.task,
                data=table.data,
                references=tuple(self.models[model]),
                images=table.images,
                recipe=table.recipe,
                second_hand=table.second_hand,
            )
            for table in self.tables
            for model, methods in table.values.items()
            for method, values in methods.items()
            for pattern, value in values.items()
        ]


def _check_pattern(method: str, pattern: float | str) -> None:
    sparsity, text = (None, pattern) if isinstance(pattern, str) else (pattern, None)
    try:
        parse_pattern(sparsity, text, "row")
    except PruneForgeError as error:
        raise ValueError(f"method {method!r}: {error}") from None
    if (method == DENSE) != (pattern == NOTHING):
        raise ValueError(f"method {method!r} has the pattern {pattern}; the sparsity {NOTHING} is {DENSE!r}, alone")


def published_numbers() -> list[Published]:
    """Return every number that plugins registered.

    Raises:
        PruneForgeError: A file cannot be read, or holds something else, naming the plugin.
    """
    files = loaded_plugins().registry.files("published")
    return [number for file in files for number in _numbers(file)]


def published_for(cell: Cell, evaluation: Mapping[str, Any]) -> Published | None:
    """Return what was published for a cell, evaluated as `evaluation` was.

    A method is published by the names of its parts, so one with options of its own has no number; neither has a task
    with options that may change what it measures, such as a `limit`, or a method that saw other calibration data than
    the table states.

    Args:
        cell: The cell.
        evaluation: One of its evaluations, as the study's folder holds it.
    """
    method = _method(cell.recipe)
    return None if method is None else _find(cell, evaluation, method, cell.pattern, cell.recipe)


def published_dense(cell: Cell, evaluation: Mapping[str, Any]) -> Published | None:
    """Return what was published for the dense model of a cell; the arguments are those of `published_for`."""
    return _find(cell, evaluation, DENSE, NOTHING, None)


def _find(
    cell: Cell, evaluation: Mapping[str, Any], method: str, pattern: float | str, recipe: PruneRecipe | None
) -> Published | None:
    """Return the first number of a protocol; `recipe` is what its calibration data are compared with."""
    task = evaluation["task"]
    if any(each.task == task and not HARMLESS.issuperset(each.options) for each in cell.tasks):
        return None
    measured = (evaluation["measure"], evaluation.get("window"))
    data, images = (None, evaluation.get("data", {}).get("source")), (None, evaluation.get("images"))
    for number in published_numbers():
        if (
            (number.method, number.pattern) == (method, pattern)
            and (number.measure, number.window) == measured
            and number.task in (task, task.partition(":")[0])
            and number.data in data
            and number.images in images
            and (recipe is None or _saw(recipe, number.recipe))
            and not number.second_hand
            and _name(cell.recipe.model) in map(_name, number.references)
        ):
            return number
    return None


def _saw(recipe: PruneRecipe, stated: Mapping[str, Any]) -> bool:
    """Return whether calibration sees what a table states; a recipe without any has a metric that needs none."""
    if recipe.calibration is None:
        return True
    own = recipe.model_dump(include=set(SEEN))
    own["seqlen"] = own["seqlen"] or LONGEST_DEFAULT
    return all(own[name] == value for name, value in {"source_options": {}, "streams": {}, **stated}.items())


def _method(recipe: PruneRecipe) -> str | None:
    """Return what a method is published as, or `None` if it is more than the names of its parts."""
    options = (recipe.options, recipe.allocator_options, recipe.refine_options, recipe.recover_options)
    if any(options) or recipe.objective or recipe.exclude:
        return None
    parts = (recipe.allocator, recipe.metric, *recipe.refine, recipe.recover)
    return " + ".join(part for part in parts if part)


def _name(reference: str) -> str:
    """Return the last part of a reference, which a hub id, its mirror and a local copy share."""
    return re.split(r"[/:]", reference.rstrip("/"))[-1].lower()


@functools.cache
def _numbers(file: Shipped) -> list[Published]:
    who = f"published {file.name!r} of plugin {file.plugin!r}"
    try:
        return PublishedFile.model_validate(parse_yaml(file.read(), who)).numbers()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PruneForgeError(f"{who}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
