"""Published numbers, which plugins ship, to stand beside what a study finds."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.patterns import parse_pattern
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.shipped import Shipped
from pruneforge.plugins import loaded_plugins
from pruneforge.studies.study import Cell

DENSE, NOTHING = "dense", 0.0
"""What published numbers call the model as it is: its method, and the sparsity that is its pattern."""


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
    second_hand: bool = False


class PublishedTable(BaseModel):
    """Numbers of one publication that were measured alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="The publication, and where it says so.")
    task: str = Field(description="Name of the evaluator, or name:argument.")
    measure: str = Field(description="What the evaluator calls the number.")
    data: str | None = Field(None, description="Source of the evaluation data, if the task does not imply them.")
    window: int | None = Field(None, ge=1, description="Tokens that were evaluated at a time.")
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
        """Check that models are declared and patterns are some."""
        for table in self.tables:
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
    with a `limit`, which measures something else.

    Args:
        cell: The cell.
        evaluation: One of its evaluations, as the study's folder holds it.
    """
    method = _method(cell.recipe)
    return None if method is None else _find(cell, evaluation, method, cell.pattern)


def published_dense(cell: Cell, evaluation: Mapping[str, Any]) -> Published | None:
    """Return what was published for the dense model of a cell; the arguments are those of `published_for`."""
    return _find(cell, evaluation, DENSE, NOTHING)


def _find(cell: Cell, evaluation: Mapping[str, Any], method: str, pattern: float | str) -> Published | None:
    task = evaluation["task"]
    if any(each.task == task and "limit" in each.options for each in cell.tasks):
        return None
    measured = (evaluation["measure"], evaluation.get("window"))
    data = (None, evaluation.get("data", {}).get("source"))
    for number in published_numbers():
        if (
            (number.method, number.pattern) == (method, pattern)
            and (number.measure, number.window) == measured
            and number.task in (task, task.partition(":")[0])
            and number.data in data
            and not number.second_hand
            and _name(cell.recipe.model) in map(_name, number.references)
        ):
            return number
    return None


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
        return PublishedFile.model_validate(yaml.safe_load(file.read())).numbers()
    except yaml.YAMLError as error:
        raise PruneForgeError(f"{who} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PruneForgeError(f"{who}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
