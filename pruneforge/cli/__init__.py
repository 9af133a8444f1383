"""The command line. Importing it imports neither torch nor transformers."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pruneforge.cli import (
    apply,
    check,
    common,
    compare,
    demo,
    doctor,
    evaluate,
    inspect,
    new,
    plugins,
    prune,
    push,
    recover,
    settings,
    sweep,
)
from pruneforge.cli.stopping import stop_in_order, stopped
from pruneforge.errors import PruneForgeError

USER_ERROR = 2


_UsageError: Any = typer.BadParameter.__mro__[1]  # typer does not export what all of its usage errors are


class _Group(TyperGroup):
    """Turns errors a user can mend into one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        with _one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    """Print an error that a user can mend as one line, with its traceback if asked for, and exit."""
    try:
        yield
    except KeyboardInterrupt as error:
        print("pruneforge: interrupted; no output was written", file=sys.stderr)
        raise stopped(error) from None
    except (PruneForgeError, _UsageError, OSError) as error:
        if common.everywhere.debug:
            traceback.print_exc()
        print(f"pruneforge: {_said(error)}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from None


def _said(error: Exception) -> str:
    if isinstance(error, OSError):  # what the system refuses: a name that is too long, a folder that is not ours
        named = f"{error.filename!r}: " if error.filename is not None else ""
        return f"{named}{error.strerror or error}"
    if isinstance(error, _UsageError):
        return f"{error.format_message().rstrip('.')}; see --help"
    return str(error)


app = typer.Typer(
    cls=_Group,
    help="One-shot pruning of transformers: metrics and architectures as plugins, one loop for all of them.",
    epilog="Start with `pruneforge demo`; `pruneforge COMMAND --help` shows examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from pruneforge.plugins import DISTRIBUTION

        print(f"pruneforge {metadata.version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and nothing else.")
    ] = False,
) -> None:
    """One-shot pruning of transformers: metrics and architectures as plugins, one loop for all of them."""


app.command(cls=prune.Command, epilog=prune.EXAMPLES)(prune.prune)
app.command(cls=recover.Command, epilog=recover.EXAMPLES)(recover.recover)
app.command(cls=evaluate.Command, name="eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(cls=compare.Command, epilog=compare.EXAMPLES)(compare.compare)
app.command(cls=sweep.Command, epilog=sweep.EXAMPLES)(sweep.sweep)
app.command(cls=settings.SettingsCommand, epilog=apply.EXAMPLES)(apply.apply)
app.command(cls=settings.SettingsCommand, epilog=inspect.INSPECT_EXAMPLES)(inspect.inspect)
app.command(cls=settings.SettingsCommand, epilog=inspect.DIFF_EXAMPLES)(inspect.diff)
app.command(cls=settings.SettingsCommand, epilog=push.EXAMPLES)(push.push)
app.command(cls=settings.SettingsCommand, epilog=plugins.EXAMPLES)(plugins.plugins)
app.command(cls=settings.SettingsCommand, epilog=check.EXAMPLES)(check.check)
app.command(cls=settings.SettingsCommand, epilog=new.EXAMPLES)(new.new)
app.command(cls=demo.Command, epilog=demo.EXAMPLES)(demo.demo)
app.command(cls=settings.SettingsCommand, epilog=doctor.EXAMPLES)(doctor.doctor)


def main() -> None:
    """Run the command line."""
    stop_in_order()
    try:
        app()
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(end.code, int | None):
            # Everything is written and closed. With several processes, threads of torch's may abort while the
            # interpreter is taken down, and torchrun would call the run failed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise
