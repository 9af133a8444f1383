"""Options that a plugin declares: typed, validated, listed by `pruneforge plugins`."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined

from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.trust import check_typed


class Options(BaseModel):
    """Base of every plugin's options: one annotated field an option, unknown names refused.

    Texts from a command line are read as the declared type (`"100"` as a float, `"yes"` as a bool).

    An option whose value is code to run, such as a folder of definitions, is declared with
    `json_schema_extra={"runs_code": True}`: a command takes it as typed, and not from a recipe or study alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class Configurable:
    """Base of everything a plugin can register: a name, and options given as keywords.

    A subclass declares its options as a nested class and narrows the annotation::

        class Scaled(Metric):
            class Options(Metric.Options):
                power: float = Field(1.0, description="exponent of the weight")
            options: Options

    Attributes:
        options: The validated options.
        name: The name it was registered under, or the class name in lower case.

    Raises:
        PruneForgeError: An option is unknown or has a value outside its type.
    """

    Options: type[Options] = Options
    options: Any
    name: str
    argument: ClassVar[str | None] = None
    """The option that the part after the colon sets in `name:argument`; `None` allows no argument."""

    def __init__(self, **options: Any) -> None:
        self.name = getattr(self, "name", type(self).__name__.lower())
        self.options = parse_options(type(self), options, self.name)


def parse_options(cls: type[Configurable], values: Mapping[str, Any], name: str) -> Options:
    """Validate `values` against the options that `cls` declares.

    Args:
        cls: The plugin class.
        values: Option names and values; texts are converted to the declared type.
        name: What to call the plugin in a message.

    Raises:
        PruneForgeError: Naming the option, and either the nearest known one or what is wrong; or its value is code,
            which nobody typed.
    """
    for key in values:
        if key not in cls.Options.model_fields:
            raise unknown_name(f"option of {name}", key, cls.Options.model_fields)
    try:
        made = cls.Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "options"
        value = f"={first['input']!r}" if first["type"] != "missing" else ""
        reason = first["msg"].removeprefix("Value error, ")
        raise PruneForgeError(f"option {key}{value} of {name}: {reason[:1].lower()}{reason[1:]}") from None
    for key, field in cls.Options.model_fields.items():
        extra, value = field.json_schema_extra, getattr(made, key)
        if isinstance(extra, dict) and extra.get("runs_code") and value not in (None, field.default):
            check_typed(key, str(value))
    return made


def describe_options(cls: type[Configurable]) -> list[dict[str, Any]]:
    """Return name, type, default and description of every option of a plugin class."""
    described = []
    for name, field in cls.Options.model_fields.items():
        default = None if field.default is PydanticUndefined else field.default
        described.append(
            {
                "name": name,
                "type": _type_text(field.annotation),
                "default": default,
                "required": field.is_required(),
                "description": field.description or "",
            }
        )
    return described


def _type_text(annotation: Any) -> str:
    """Return a type as a user would write its values: `float`, `l1|l2`, `int|None`."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "|".join(str(argument) for argument in arguments)
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_type_text(argument) for argument in arguments)
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
