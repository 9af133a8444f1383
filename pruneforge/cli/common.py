"""What the commands share: common options, recipe files, printing."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pruneforge.errors import PruneForgeError

Config = Annotated[
    Path | None,
    typer.Option(help="Recipe (YAML or a report) with any of these settings; the command line wins.", metavar="FILE"),
]
PluginFiles = Annotated[
    list[str] | None,
    typer.Option("--plugin", "-p", help="Load a Python file as a plugin; repeatable.", metavar="FILE"),
]
QUIET = "PRUNEFORGE_QUIET"
Quiet = Annotated[bool, typer.Option("--quiet", envvar=QUIET, help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the program an error arose.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub model, as OWNER/NAME@REVISION.", metavar="NAME")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

# As wide as its tables need where nobody sees the edge: in a pipe or a file they are not cut. Names and messages are
# shown as they are: what looks like markup in one is somebody's text.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000, markup=False, emoji=False)


@dataclass
class Everywhere:
    """What the options that every command has were given.

    Attributes:
        quiet: No progress.
        debug: The traceback of an error too.
    """

    quiet: bool = False
    debug: bool = False


everywhere = Everywhere()


def progress() -> bool:
    """Return whether to show progress."""
    return not everywhere.quiet


def load_plugin_files(files: list[str] | None) -> None:
    """Load the plugin files given with `-p`."""
    from pruneforge.plugins import loaded_plugins

    installed = loaded_plugins()
    for file in files or []:
        installed.load_file(file)
    for plugin in installed.loaded:
        if plugin.error:
            last = plugin.error.strip().splitlines()[-1]
            warn([f"plugin {plugin.name!r} ({plugin.origin} {plugin.version}) failed to load: {last}"])


def quieten(quiet: bool) -> None:
    """Keep the libraries' own advice away, and their progress bars out of pipes and log files.

    Through their environment variables, so that none is imported for it; what the user set stays.

    Args:
        quiet: Whether to keep the bars off a terminal too, as the environment may say as well.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    asked = os.environ.get(QUIET, "").lower() in ("1", "true", "t", "yes", "y", "on")
    if quiet or asked or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def assignments(values: list[str] | None, flag: str) -> dict[str, Any]:
    """Return `name=value` texts as a mapping; values that look like JSON lists or objects are read as such.

    Raises:
        PruneForgeError: A text has no `=`, or is broken JSON.
    """
    assigned: dict[str, Any] = {}
    for text in values or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise PruneForgeError(f"{flag} {text!r} is not of the form name=value")
        try:
            assigned[name] = json.loads(value) if value.startswith(("{", "[")) else value
        except ValueError as error:
            raise PruneForgeError(f"{flag} {text!r} is not valid JSON: {error}") from None
    return assigned


def options_by_name(options: dict[str, Any], flag: str) -> dict[str, dict[str, Any]]:
    """Return `NAME.OPTION` and its value as a mapping of options by name.

    Raises:
        PruneForgeError: An option is written without the name.
    """
    nested: dict[str, dict[str, Any]] = {}
    for text, value in options.items():
        if isinstance(value, dict):  # as a recipe writes them
            nested.setdefault(text, {}).update(value)
            continue
        name, dot, option = text.partition(".")
        if not dot:
            raise PruneForgeError(f"{flag} {text}=... is for several; write {flag} NAME.{text}=...")
        nested.setdefault(name, {})[option] = value
    return nested


def at_revision(model: str, revision: str | None) -> str:
    """Return the reference to a hub model at a revision.

    Raises:
        PruneForgeError: It has one already, or is no model of the Hub.
    """
    if revision is None:
        return model
    from pruneforge.runs.places import hub_id

    if "@" in model or hub_id(model) is None:
        raise PruneForgeError(f"--revision is for a hub id, such as OWNER/NAME, and the model is {model!r}")
    return f"{model}@{revision}"


def warn(warnings: list[str]) -> None:
    """Print warnings to standard error, one line each."""
    for warning in warnings:
        print(f"pruneforge: warning: {warning}", file=sys.stderr)


def shown(value: Any) -> str:
    """Return a value as a table shows it: numbers rounded, lists without brackets, nothing for what is not there."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}"
    if isinstance(value, dict):
        return " ".join(f"{name} {shown(item)}" for name, item in value.items())
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def mebibytes(count: int) -> str:
    """Return a byte count in MiB."""
    return f"{mebi(count)} MiB"


def mebi(count: int) -> str:
    """Return how many MiB a byte count is."""
    return f"{count / 2**20:,.0f}"
