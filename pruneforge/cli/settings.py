"""Commands whose options are declared elsewhere: as fields of a recipe, of resources, or of a plugin's options."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from pruneforge.cli import common
from pruneforge.errors import PruneForgeError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Fields = Mapping[str, "FieldInfo"]

ASSIGNMENT = "NAME=VALUE"
"""How the help shows an option for one entry of a mapping."""

_PLUGIN_OPTIONS = "pruneforge.plugin_options"
_SETTINGS = "pruneforge.settings"


class SettingsCommand(TyperCommand):
    """A command that has an option for each of its settings, beside the parameters of its function.

    A parameter of the function that is called like a setting stands for it. The others do not reach the function as
    arguments; it gets those that were given, on the command line or in a recipe, from `settings`.

    Options of a plugin that the command line names are options of the command: `--window` of an evaluator, say.

    Attributes:
        plugin_options: For each setting that names a plugin, its kind, and the setting that takes its options.
    """

    plugin_options: ClassVar[dict[str, tuple[str, str]]] = {}

    def fields(self) -> Fields:
        """Return the declared settings, in the order of the help."""
        return {}

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments, settings, the other options, and those of plugins."""
        own = super().get_params(ctx)
        by_name = {parameter.name: parameter for parameter in [*self._options, *own]}
        names = [parameter.name for parameter in own if parameter.param_type_name == "argument"]
        names += [name for name in self.fields() if name not in names]
        names += [parameter.name for parameter in own if parameter.name not in names]
        return [by_name[name] for name in names] + [
            option for options in ctx.meta.get(_PLUGIN_OPTIONS, {}).values() for option in options
        ]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the recipe file, and make options of what plugins declare, before anything is parsed."""
        common.quieten()
        ctx.ignore_unknown_options = True
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        ctx.ignore_unknown_options = False
        file = given.get("config")
        config = _read_config(Path(file)) if file else {}
        common.load_plugin_files(given.get("plugins") or config.get("plugins"))
        known = {parameter.name for parameter in self.get_params(ctx)}
        if given.get("help") or any(text.startswith("--") for text in rest) or not known.issuperset(config):
            ctx.meta[_PLUGIN_OPTIONS] = self._options_of_plugins({**config, **given}, known)
        if file:
            known = {parameter.name for parameter in self.get_params(ctx)} - {"config", "help", "as_json"}
            ctx.default_map = {**(ctx.default_map or {}), **_checked(config, known, file)}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the function, with the settings where `settings` finds them."""
        options = {option.name: option for option in self._options if option.name in ctx.params}
        values = _given(ctx, options)
        for setting, of_plugin in ctx.meta.get(_PLUGIN_OPTIONS, {}).items():
            for name, value in _given(ctx, {option.name: option for option in of_plugin}).items():
                if name in values.setdefault(setting, {}):
                    raise PruneForgeError(f"option {name!r} is given twice")
                values[setting][name] = value
        ctx.meta[_SETTINGS] = values
        with self._flags_in_messages(ctx):
            return super().invoke(ctx)

    @functools.cached_property
    def _options(self) -> list[Any]:
        """Options of the settings that the function has no parameter for."""
        taken = {parameter.name for parameter in self.params}
        return _options({name: field for name, field in self.fields().items() if name not in taken})

    def _options_of_plugins(self, named: Mapping[str, Any], taken: set[str]) -> dict[str, list[Any]]:
        """Return options for what the named plugins declare, by the setting that takes them.

        A name that the command itself takes, or that two of the plugins declare, has no option of its own; it is given
        as the plugin's kind is given its options.

        Raises:
            PruneForgeError: There is no plugin of a name, or it cannot be imported.
        """
        fields: dict[str, tuple[str, Fields]] = {}
        for chooser, (kind, setting) in self.plugin_options.items():
            if named.get(chooser):
                cls = _plugin(kind, str(named[chooser]))
                fields[setting] = (f"Options of {kind} {named[chooser]}", cls.Options.model_fields)
        names = [name for _, declared in fields.values() for name in declared]
        free = {name for name in names if names.count(name) == 1 and name not in taken}
        return {
            setting: _options({name: field for name, field in declared.items() if name in free}, panel)
            for setting, (panel, declared) in fields.items()
        }

    @contextmanager
    def _flags_in_messages(self, ctx: Any) -> Iterator[None]:
        """Write options in messages as they are typed: the messages name `source_options` as Python does."""
        try:
            yield
        except PruneForgeError as error:
            named = {**ctx.params, **settings(ctx)}
            known = self.get_params(ctx)
            with_plugins = self._options_of_plugins(named, {parameter.name for parameter in known})
            options = [*known, *(option for options in with_plugins.values() for option in options)]
            flags = {option.name: max(option.opts, key=len) for option in options if option.param_type_name == "option"}
            text = re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), str(error))
            raise PruneForgeError(text) from error


def settings(ctx: Any) -> dict[str, Any]:
    """Return the settings that were given, by name; one that is not among them is at its default."""
    return dict(ctx.meta[_SETTINGS])


def fields_of(model: Any, *names: str) -> Fields:
    """Return fields of a pydantic model, all or those named; those that it inherits come last."""
    fields: Fields = model.model_fields
    inherited = [name for base in model.__mro__[1:] for name in getattr(base, "model_fields", {})]
    ordered = sorted(fields, key=inherited.__contains__)
    return {name: fields[name] for name in ordered if not fields[name].exclude and (not names or name in names)}


def _plugin(kind: str, spec: str) -> Any:
    from pruneforge.interfaces.source import source_spec
    from pruneforge.plugins import loaded_plugins

    registry = loaded_plugins().registry
    if kind == "source":
        spec = source_spec(spec, registry)
    return registry.get(kind, spec.partition(":")[0]).load()


def _options(fields: Fields, panel: str | None = None) -> list[Any]:
    """Return an option for each field; typer makes it of an annotated parameter, as those of a function."""

    def declared() -> None:
        pass

    parameters = [_parameter(name, field, panel) for name, field in fields.items()]
    declared.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(declared)
    return [parameter for parameter in typer.main.get_command(app).params if parameter.name in fields]


def _parameter(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    """Return a field as a parameter that typer understands; a mapping or a list is an option that can be repeated."""
    kind = _type(field.annotation)
    repeated = kind == list[str]
    flag = f"--{name.removesuffix('s') if repeated else name}".replace("_", "-")
    default = None if repeated else field.get_default()
    if kind is bool and default is True:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    metavar = (
        str(extra["metavar"]) if "metavar" in extra else (ASSIGNMENT if get_origin(field.annotation) is dict else None)
    )
    lowest = next((limit.ge for limit in field.metadata if hasattr(limit, "ge")), None)
    text = field.description or ""
    text = f"{text[:1].upper()}{text[1:].removesuffix('.')}." + (" Repeatable." if repeated else "")
    if field.is_required():
        # A plugin says itself what it lacks, since a recipe's options may hold it.
        default, text = (..., text) if panel is None else (None, f"{text} Required.")
    option = typer.Option(flag, help=text, metavar=metavar, min=lowest, rich_help_panel=panel)
    annotation = kind if default is not None else kind | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is ... else default,
        annotation=Annotated[annotation, option],
    )


def _type(annotation: Any) -> Any:
    """Return what an option of the command line takes for a field: bool, int, float, str, a choice, or texts."""
    origin, arguments = get_origin(annotation), [kind for kind in get_args(annotation) if kind is not NoneType]
    if origin in (Union, UnionType):
        return _type(arguments[0]) if len(arguments) == 1 else str
    if origin in (dict, list):
        return list[str]
    if origin is Literal and all(isinstance(choice, str) for choice in arguments):
        return annotation
    return annotation if annotation in (bool, int, float) else str


def _given(ctx: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Take the values of options out of what the function is called with, and return those that were given."""
    values = {name: ctx.params.pop(name) for name in options}
    sources = {name: ctx.get_parameter_source(name) for name in options}
    given = {name: value for name, value in values.items() if sources[name].name != "DEFAULT" and value is not None}
    for name, value in given.items():
        if options[name].metavar == ASSIGNMENT:
            given[name] = common.assignments(list(value), options[name].opts[0])
        elif options[name].multiple:
            given[name] = list(value)
    return given


def _read_config(path: Path) -> dict[str, Any]:
    from pruneforge.runs.recipe_file import read_config

    return read_config(path)


def _checked(config: Mapping[str, Any], known: Sequence[str] | set[str], file: str) -> dict[str, Any]:
    """Return the settings of a recipe file as a command line gives them.

    Raises:
        PruneForgeError: One is not a setting of the command.
    """
    from pruneforge.errors import unknown_name

    values = {}
    for name, value in config.items():
        if name not in known:
            raise unknown_name(f"setting in recipe {file!r}:", str(name), known)
        if isinstance(value, dict):
            value = [f"{key}={_as_text(inner)}" for key, inner in value.items() if inner is not None]
        values[name] = value
    return values


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
