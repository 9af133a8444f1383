"""Commands whose options are declared elsewhere: as fields of a recipe, of resources, or of a plugin's options."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from typer.core import TyperCommand

from pruneforge import trust
from pruneforge.cli import common, reach
from pruneforge.cli.fields import Fields, flags_of, options_for, options_of, take_given
from pruneforge.cli.panels import arranged
from pruneforge.cli.typed import typed_options
from pruneforge.errors import PruneForgeError, unknown_name

_PLUGIN_OPTIONS = "pruneforge.plugin_options"
_SETTINGS = "pruneforge.settings"
_TYPED = "pruneforge.typed"


OF_RUN = {
    "metric": ("metric", "options"),
    "calibration": ("source", "source_options"),
    "allocator": ("allocator", "allocator_options"),
    "recover": ("recovery", "recover_options"),
    "objective": ("objective", "objective_options"),
}
"""Settings of a run that name a plugin: the plugin's kind, and the setting that takes its options."""


OF_ONE_CALL = {"config", "help", "as_json", "quiet", "debug", "force", "trust"}
"""What a recipe file cannot say: what is shown, that files which are not ours are replaced, and that code may run."""


class SettingsCommand(TyperCommand):
    """A command that has an option for each of its settings, beside the parameters of its function.

    A parameter of the function that is called like a setting replaces its option. The other settings do not reach the
    function as arguments; it gets those that were given, on the command line or in a recipe, from `settings`.

    Options of a plugin that the command line names are options of the command: `--window` of an evaluator, say.

    Attributes:
        plugin_options: For each setting that names a plugin, its kind, and the setting that takes its options.
    """

    plugin_options: ClassVar[dict[str, tuple[str, str]]] = {}

    def fields(self) -> Fields:
        """Return the declared settings, in the order of the help."""
        return {}

    def plugin_named(self, chooser: str, value: Any) -> str | None:
        """Return the one plugin that a setting's value names, `name` or `name:argument`, or `None`."""
        return str(value) if value else None

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments, settings, the other options, and those of plugins."""
        *own, shown = super().get_params(ctx)  # the last is --help
        own += [*self._everywhere, shown]
        by_name = {parameter.name: parameter for parameter in [*self._options, *own]}
        names = [parameter.name for parameter in own if parameter.param_type_name == "argument"]
        names += [name for name in self.fields() if name not in names]
        names += [parameter.name for parameter in own if parameter.name not in names]
        of_plugins = [option for options in ctx.meta.get(_PLUGIN_OPTIONS, {}).values() for option in options]
        return arranged([by_name[name] for name in names] + of_plugins)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the recipe file, and make options of what plugins declare, before anything is parsed."""
        own = self.get_params(ctx)
        ctx.ignore_unknown_options = True  # whose they are shows once it is known which plugins are named
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        ctx.ignore_unknown_options = False
        ctx.meta[_TYPED] = set(typed_options(args))
        common.quieten(bool(given.get("quiet")))  # before a plugin imports the libraries
        file = given.get("config")
        config = _read_config(Path(file)) if file else {}
        known = {parameter.name for parameter in own}
        if given.get("help"):
            with suppress(PruneForgeError):  # the help of the command itself is there in any case
                common.load_plugin_files(given.get("plugins"))
                ctx.meta[_PLUGIN_OPTIONS] = self._options_of_plugins(given, own)
            return super().parse_args(ctx, args)
        if not given.get("plugins"):
            _refuse_plugins(_texts(config.get("plugins"), file), file)
        common.load_plugin_files(given.get("plugins"))
        if _has_other_flags(args, own) or not known.issuperset(config):
            ctx.meta[_PLUGIN_OPTIONS] = self._options_of_plugins({**config, **given}, own)
        if file:
            known = {parameter.name for parameter in self.get_params(ctx)} - OF_ONE_CALL
            ctx.default_map = {**(ctx.default_map or {}), **_checked(config, known, file)}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the function, with the settings where `settings` finds them."""
        for option in self._everywhere:
            setattr(common.everywhere, option.name, ctx.params.pop(option.name))
        values = take_given(ctx, self._options)
        for setting, options in ctx.meta.get(_PLUGIN_OPTIONS, {}).items():
            mapping = ctx.get_parameter_source(setting).name
            for name, value in take_given(ctx, options).items():
                flag = ctx.get_parameter_source(name).name
                if name in values.get(setting, {}):
                    if flag == mapping:
                        raise PruneForgeError(f"option {name!r} is given twice")
                    if mapping == "COMMANDLINE":  # which wins over a recipe
                        continue
                values[setting] = {**values.get(setting, {}), name: value}
        ctx.meta[_SETTINGS] = values
        reach.answer_fast()
        with trust.typed(ctx.meta[_TYPED]), self._flags_in_messages(ctx):
            return super().invoke(ctx)

    @functools.cached_property
    def _options(self) -> list[Any]:
        """Options of the settings that the function has no parameter for."""
        taken = {parameter.name for parameter in self.params}
        return options_for({name: field for name, field in self.fields().items() if name not in taken})

    @functools.cached_property
    def _everywhere(self) -> list[Any]:
        """Options that every command has."""

        def declared(quiet: common.Quiet = False, debug: common.Debug = False) -> None:
            """Typer makes options of a function's annotated parameters."""

        return options_of(declared)

    def _options_of_plugins(self, named: Mapping[str, Any], own: list[Any]) -> dict[str, list[Any]]:
        """Return options for what the named plugins declare, by the setting that takes them.

        One that the command has itself, or that two of the plugins declare, is left out; it is given in the mapping
        of the plugin's options.

        Args:
            named: Values of the settings that name plugins.
            own: The command's own parameters.

        Raises:
            PruneForgeError: There is no plugin of a name, or it cannot be imported.
        """
        made: dict[str, list[Any]] = {}
        for chooser, (kind, setting) in self.plugin_options.items():
            spec = self.plugin_named(chooser, named.get(chooser))
            if spec:
                made[setting] = options_for(_plugin_fields(kind, spec), f"Options of {kind} {spec}")
        names = {parameter.name for parameter in own}
        flags = [flag for parameter in own for flag in flags_of(parameter)]
        flags += [flag for options in made.values() for option in options for flag in flags_of(option)]
        return {
            setting: [
                option
                for option in options
                if option.name not in names and all(flags.count(flag) == 1 for flag in flags_of(option))
            ]
            for setting, options in made.items()
        }

    @contextmanager
    def _flags_in_messages(self, ctx: Any) -> Iterator[None]:
        """Write options in messages as they are typed: the messages name `source_options` as Python does."""
        try:
            yield
        except PruneForgeError as error:
            known = self.get_params(ctx)
            flags = {option.name: max(flags_of(option), key=len) for option in known if flags_of(option)}
            with suppress(PruneForgeError):  # what is wrong with a plugin's name says the error itself
                for options in self._options_of_plugins({**ctx.params, **settings(ctx)}, known).values():
                    flags.update({option.name: option.opts[0] for option in options})
            text = re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), str(error))
            raise PruneForgeError(text) from error


def settings(ctx: Any) -> dict[str, Any]:
    """Return the settings that were given, by name; one that is not among them is at its default."""
    return dict(ctx.meta[_SETTINGS])


def _has_other_flags(args: list[str], own: list[Any]) -> bool:
    """Return whether a command line has long options that are not the command's own."""
    flags = {flag for parameter in own for flag in flags_of(parameter)}
    before = args[: args.index("--")] if "--" in args else args
    return any(text.startswith("--") and text.partition("=")[0] not in flags for text in before)


def _plugin_fields(kind: str, spec: str) -> Fields:
    """Return the options of the plugin that `name` or `name:argument` means, but for the one the argument sets.

    Raises:
        PruneForgeError: There is none, or it cannot be imported.
    """
    from pruneforge.interfaces.source import source_spec
    from pruneforge.plugins import loaded_plugins

    registry = loaded_plugins().registry
    if kind == "source":
        spec = source_spec(spec, registry)
    name, colon, _ = spec.partition(":")
    cls = registry.get(kind, name).load()
    return {name: field for name, field in cls.Options.model_fields.items() if not (colon and name == cls.argument)}


def _read_config(path: Path) -> dict[str, Any]:
    from pruneforge.runs.recipe_file import read_config

    return read_config(path)


def _texts(value: Any, file: str | None) -> list[str]:
    """Return the plugin files that a recipe names.

    Raises:
        PruneForgeError: They are not a list of texts.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise PruneForgeError(f"recipe {file!r}: plugins must be a list of files, such as ['mine.py']")
    return value


def _refuse_plugins(files: Sequence[str], recipe: str | None) -> None:
    """Raise if a recipe names plugin files: they are code, which runs only if the command line asks for it.

    Raises:
        PruneForgeError: Naming the first file, with its hash, and what to type.
    """
    for file in files:
        content = Path(file).read_bytes() if Path(file).is_file() else None
        found = "does not exist" if content is None else f"has the SHA-256 {hashlib.sha256(content).hexdigest()}"
        wanted = " ".join(f"-p {shlex.quote(each)}" for each in files)
        raise PruneForgeError(
            f"recipe {recipe!r} names the plugin file {file!r}, which {found}; it is code, and runs only where the "
            f"command line names it: add {wanted}"
        )


def _checked(config: Mapping[str, Any], known: set[str], file: str) -> dict[str, Any]:
    """Return the settings of a recipe file as a command line gives them.

    Raises:
        PruneForgeError: One is not a setting of the command.
    """
    values = {}
    for name, value in config.items():
        if name not in known:
            raise unknown_name(f"setting in recipe {file!r}:", name, known)
        if isinstance(value, dict):
            value = [f"{key}={_as_text(inner)}" for key, inner in value.items() if inner is not None]
        values[name] = value
    return values


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
