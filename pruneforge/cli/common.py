"""What the commands share: common options, recipe files, printing."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pruneforge.errors import PruneForgeError

# In a recipe, what a command line repeats is a mapping or list with a plural name.
_REPEATED = {
    "options": "option",
    "source_options": "source_option",
    "adapter_options": "adapter_option",
    "plugins": "plugin",
}


def with_flags(text: str, ctx: typer.Context) -> str:
    """Return a message with options as they are typed: messages name `source_options` as Python does."""
    commands: Any = ctx.find_root().command
    flags: dict[str, str] = {}
    for command in commands.commands.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                flags[str(parameter.name)] = max(parameter.opts, key=len)  # the long form

    def flag(found: re.Match[str]) -> str:
        return flags.get(_REPEATED.get(found[1], found[1]), found[0])

    return re.sub(r"`(\w+)`", flag, text)


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    from pruneforge.runs.recipe import read_config

    plural = {singular: plural for plural, singular in _REPEATED.items()}
    taken = {plural.get(str(p.name), str(p.name)) for p in ctx.command.params}
    settings = {}
    for name, value in read_config(path, taken - {"config", "help", "as_json"}).items():
        if isinstance(value, dict):
            value = [f"{key}={_as_text(inner)}" for key, inner in value.items() if inner is not None]
        settings[_REPEATED.get(name, name)] = value
    ctx.default_map = {**(ctx.default_map or {}), **settings}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        help="Recipe (YAML or a report) with any of these settings; the command line wins.",
        is_eager=True,
        callback=_read_config,
        metavar="FILE",
    ),
]
PluginFiles = Annotated[
    list[str] | None,
    typer.Option("--plugin", "-p", help="Load a Python file as a plugin; repeatable.", metavar="FILE"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto keeps the checkpoint's; float16, bfloat16, float32, float64.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Samples that go through together. (default: by length)")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

console = Console()


def load_plugin_files(files: list[str] | None) -> None:
    """Load the plugin files given with `-p`."""
    from pruneforge.plugins import plugins

    for file in files or []:
        plugins().load_file(file)
    for plugin in plugins().loaded:
        if plugin.error:
            last = plugin.error.strip().splitlines()[-1]
            warn([f"plugin {plugin.name!r} ({plugin.origin} {plugin.version}) failed to load: {last}"])


def quieten() -> None:
    """Keep the libraries' own progress bars and advice out of pipes and log files.

    Through their environment variables, so that none is imported for it; what the user set stays.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def assignments(values: list[str] | None, flag: str) -> dict[str, Any]:
    """Return `name=value` texts as a mapping; values that look like JSON lists or objects are read as such.

    Raises:
        PruneForgeError: A text has no `=`, or is broken JSON.
    """
    found: dict[str, Any] = {}
    for text in values or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise PruneForgeError(f"{flag} {text!r} is not of the form name=value")
        try:
            found[name] = json.loads(value) if value.startswith(("{", "[")) else value
        except ValueError as error:
            raise PruneForgeError(f"{flag} {text!r} is no valid JSON: {error}") from None
    return found


def warn(warnings: list[str]) -> None:
    """Print warnings to standard error, one line each."""
    for warning in warnings:
        print(f"pruneforge: warning: {warning}", file=sys.stderr)


def mebibytes(count: int) -> str:
    """Return a byte count in MiB."""
    return f"{mebi(count)} MiB"


def mebi(count: int) -> str:
    """Return how many MiB a byte count is."""
    return f"{count / 2**20:,.0f}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
