"""Options of the command line for the fields of a pydantic model, which describe themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.markup import escape

from pruneforge.cli import common

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Fields = Mapping[str, "FieldInfo"]

_VALUES = {int: "N", float: "X", str: "TEXT", list[str]: "TEXT"}
"""What the help calls a value that is described no better."""

ASSIGNMENT = "NAME=VALUE"
"""How the help shows an option for one entry of a mapping."""


def fields_of(model: Any, *names: str) -> Fields:
    """Return fields of a pydantic model, all or those named; those that it inherits come last."""
    fields: Fields = model.model_fields
    inherited = [name for base in model.__mro__[1:] for name in getattr(base, "model_fields", {})]
    ordered = sorted(fields, key=inherited.__contains__)
    return {name: fields[name] for name in ordered if not fields[name].exclude and (not names or name in names)}


def options_for(fields: Fields, panel: str | None = None) -> list[Any]:
    """Return an option for each field that a command line can write.

    Args:
        fields: The fields, by name.
        panel: Heading of a plugin's options in the help; a field that is required may then be left out, since a
            recipe's mapping of options may hold it.
    """

    def declared() -> None:
        """Typer makes options of a function's annotated parameters."""

    parameters = [_parameter(name, field, panel) for name, field in fields.items() if _type(field.annotation)]
    declared.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return options_of(declared)


def options_of(function: Callable[..., None]) -> list[Any]:
    """Return the options that typer makes of a function's parameters."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return [
        option for option in typer.main.get_command(app).params if option.name in inspect.signature(function).parameters
    ]


def flags_of(option: Any) -> set[str]:
    """Return everything that a command line may write for an option, `--no-x` and short forms included."""
    return {*option.opts, *option.secondary_opts} if option.param_type_name == "option" else set()


def take_given(ctx: Any, options: list[Any]) -> dict[str, Any]:
    """Take the values of options out of what the function is called with, and return those that were given."""
    given = {}
    for option in options:
        value = ctx.params.pop(option.name, None)
        if value is None or ctx.get_parameter_source(option.name).name == "DEFAULT":
            continue
        if option.metavar == ASSIGNMENT:
            value = common.assignments(list(value), option.opts[0])
        given[option.name] = list(value) if option.multiple and isinstance(value, tuple) else value
    return given


def _parameter(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    """Return a field as a parameter that typer understands; a mapping or a list is an option that can be repeated."""
    kind = _type(field.annotation)
    repeated = kind == list[str]
    flag = f"--{name.removesuffix('s') if repeated else name}".replace("_", "-")
    default = None if repeated else field.get_default()
    if kind is bool and default is True:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    metavar = str(extra["metavar"]) if "metavar" in extra else _VALUES.get(kind)
    if get_origin(_without_none(field.annotation)) is dict:
        metavar = ASSIGNMENT
    lowest = next((limit.ge for limit in field.metadata if hasattr(limit, "ge")), None)
    text = escape(field.description or "")
    text = f"{text[:1].upper()}{text[1:].removesuffix('.')}." + (" Repeatable." if repeated else "")
    if field.is_required():
        default, text = (..., text) if panel is None else (None, f"{text} Required.")
    option = typer.Option(flag, help=text, metavar=metavar, min=lowest, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is ... else default,
        annotation=Annotated[kind if default is not None else kind | None, option],
    )


def _type(annotation: Any) -> Any:
    """Return what an option takes for a field: bool, int, float, str, a choice, or texts; `None` if it cannot."""
    annotation = _without_none(annotation)
    origin = get_origin(annotation)
    if origin in (dict, list):
        return list[str]
    if origin is Literal and all(isinstance(choice, str) for choice in get_args(annotation)):
        return annotation
    if origin in (Union, UnionType, Literal):
        return str
    if annotation in (bool, int, float):
        return annotation
    return str if annotation in (str, Path, Any) else None


def _without_none(annotation: Any) -> Any:
    """Return `X` for `X | None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if get_origin(annotation) in (Union, UnionType) and len(kinds) == 1 else annotation
