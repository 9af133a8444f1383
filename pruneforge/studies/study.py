"""What a study asks for, and the cells that come of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
)

from pruneforge.checkpoint.durable import write_text
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.recipe import Propagate, PruneRecipe
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.places import STUDY_FILE

OF_DATA = ("calibration", "source_options", "streams", "samples", "seqlen")
"""Settings of the recipe that a study gives for each model, and for a method that is to see other data."""

OF_MODEL = ("model", *OF_DATA, "batch_size", "dtype", "exclude", "adapter_options")
"""Settings of the recipe that a study gives for each model."""

OF_METHOD = (
    "metric",
    "options",
    "allocator",
    "allocator_options",
    "refine",
    "refine_options",
    "recover",
    "recover_options",
    "objective",
    "objective_options",
)
"""Settings of the recipe that a study gives for each method."""


def _settings(name: str, fields: tuple[str, ...]) -> Any:
    """Return a model of some of the recipe's settings, declared where the recipe declares them."""
    chosen: Any = {
        field: (PruneRecipe.model_fields[field].annotation, PruneRecipe.model_fields[field]) for field in fields
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", frozen=True), **chosen)


class Task(BaseModel):
    """One evaluation of each pruned model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(description="Name of an evaluator, or name:argument.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the evaluator.")
    batch_size: int | None = Field(None, ge=1, description="Samples per batch.")


def _once(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is named twice")
    return values


def _quoted(values: Any) -> Any:
    for value in values if isinstance(values, list) else ():
        if isinstance(value, int) and value > 1:  # YAML reads 2:4 as a number of base 60
            raise ValueError(f'{value} is no sparsity; write N:M patterns in quotes, such as "2:4"')
    return values


Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_once)]
Patterns = Annotated[list[float | str], Field(min_length=1), BeforeValidator(_quoted), AfterValidator(_once)]


class StudyModel(_settings("_OfModel", OF_MODEL)):  # type: ignore[misc]
    """One model with its data and its tasks."""

    tasks: list[Task] = Field(min_length=1, description="What each pruned model is evaluated on.")
    seeds: Seeds | None = Field(None, description="In place of the study's.")


def _overrides(fields: tuple[str, ...]) -> Any:
    """Return a model of settings that may be left out; the recipe checks those that are given."""
    declared: dict[str, Any] = {field: PruneRecipe.model_fields[field].annotation for field in fields}
    chosen: Any = {
        field: (kind | None, Field(None, description="In place of the model's.")) for field, kind in declared.items()
    }
    return create_model("_Overrides", __config__=ConfigDict(extra="forbid", frozen=True), **chosen)


class Method(_settings("_OfMethod", OF_METHOD), _overrides(OF_DATA)):  # type: ignore[misc]
    """One method, as the settings of a recipe compose it, and the data that it sees if they are not the model's."""

    propagate: Propagate | None = Field(None, description="In place of the study's.")
    models: list[str] | None = Field(None, description="The only models that it is for.")
    patterns: Patterns | None = Field(None, description="In place of the study's.")

    def overrides(self) -> dict[str, Any]:
        """Return what it has in place of the model's and the study's settings."""
        given: dict[str, Any] = self.model_dump(include={*OF_DATA, "propagate"}, exclude_none=True)
        return given


class Study(BaseModel):
    """Models, methods, patterns and calibration draws; each combination is a cell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, StudyModel] = Field(min_length=1, description="The models, by what the report calls them.")
    methods: dict[str, Method] = Field(min_length=1, description="The methods, by what the report calls them.")
    patterns: Patterns = Field(default=[0.5], description="Sparsities, and N:M in quotes.")
    seeds: Seeds = Field(default=[0, 1, 2], description="Seeds; each is a calibration draw.")
    propagate: Propagate = Field(
        "dense", description="As for prune; with dense, all methods and patterns of a draw share one pass."
    )
    device: str = Field("auto", description="Where to compute.")
    baseline: str | None = Field(None, description="Method that the others are compared with; by default the first.")
    controls: bool = Field(True, description="Whether metrics that are controls stand beside the methods.")
    details: bool = Field(
        True, description="Whether layers' errors and scores and a mask's picture are kept, of the first draw."
    )
    items: bool = Field(True, description="Whether the outcome of each image or question is kept, for paired tests.")
    keep_masks: bool = Field(False, description="Whether the masks of each cell are kept, a bit a weight.")

    @field_validator("methods", mode="before")
    @classmethod
    def _one_refiner(cls, values: Any) -> Any:
        """Take one refiner as a text, as `prune` does."""
        if not isinstance(values, dict):
            return values
        return {
            name: {**given, "refine": [given["refine"]]}
            if isinstance(given, dict) and isinstance(given.get("refine"), str)
            else given
            for name, given in values.items()
        }

    @field_validator("models", "methods")
    @classmethod
    def _names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if name.startswith(".") or not re.fullmatch(r"[\w.,+-]+( [\w.,+-]+)*", name):
                raise ValueError(f"{name!r} cannot be part of a folder's name")
        return values

    def all_methods(self) -> dict[str, Any]:
        """Return the methods, with the controls that are not among them."""
        known = [method.model_dump(exclude_defaults=True) for method in self.methods.values()]
        controls = [name for name in (control_metrics() if self.controls else ()) if {"metric": name} not in known]
        return {**self.methods, **{name: Method(metric=name) for name in controls if name not in self.methods}}

    def seeds_of(self, model: str) -> list[int]:
        """Return the calibration draws of one of the models."""
        return self.models[model].seeds or self.seeds

    @property
    def draws(self) -> str:
        """How many calibration draws there are, in words; of each model, if they differ."""
        counts = {len(self.seeds_of(model)) for model in self.models}
        low, high = min(counts), max(counts)
        return f"{low if low == high else f'{low} to {high}'} calibration draw{'s' if high > 1 else ''}"

    @property
    def compared_with(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.methods))


def control_metrics() -> list[str]:
    """Return the names of the registered metrics that stand beside any method as a control."""
    names = []
    for entry in loaded_plugins().registry.entries("metric"):
        if entry.lacking():
            continue  # `pruneforge plugins` says what
        try:
            kind = entry.load()
        except PruneForgeError:
            continue  # `pruneforge plugins` says why
        if issubclass(kind, Metric) and kind.control:
            names.append(entry.name)
    return names


def make_study(values: Mapping[str, Any], who: str = "study") -> Study:
    """Return a study of plain values.

    Raises:
        PruneForgeError: Something does not fit; the message says where, and calls the study `who`.
    """
    try:
        return Study(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PruneForgeError(f"{who}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def save_study(study: Study, folder: Path) -> None:
    """Write a study to `folder`, without what was left at its default."""
    text = yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    write_text(text, folder / STUDY_FILE)
