"""The command line. Importing it imports neither torch nor transformers."""

from __future__ import annotations

import os
import sys
from typing import Any

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
from pruneforge.errors import PruneForgeError

USER_ERROR = 2


_UsageError: Any = typer.BadParameter.__mro__[1]  # typer does not export what all of its usage errors are


class _Group(TyperGroup):
    """Turns errors a user can mend into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PruneForgeError as error:
            print(f"pruneforge: {error}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except _UsageError as error:
            print(f"pruneforge: {error.format_message().rstrip('.')}; see --help", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print("pruneforge: interrupted; no output was written", file=sys.stderr)
            raise typer.Exit(common.INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    help="One-shot pruning of transformers: metrics and architectures as plugins, one loop for all of them.",
    epilog="Start with `pruneforge demo`; `pruneforge COMMAND --help` shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
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
    try:
        app()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and isinstance(end.code, int | None):
            # Everything is written and closed. With several processes, threads of torch's may abort while the
            # interpreter is taken down, and torchrun would call the run failed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise
