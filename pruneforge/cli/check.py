"""`pruneforge check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from pruneforge.cli import common

EXAMPLES = """[bold]Examples[/bold]

pruneforge check NAME

pruneforge check mine -p mine.py --option power=0.5
"""

FAILED = 1
"""Exit code if a promise is broken."""


def check(
    name: Annotated[str, typer.Argument(help="Name of the plugin.", metavar="NAME")],
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Option of the plugin. Repeatable.", metavar="NAME=VALUE")
    ] = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Check that a plugin keeps its promises, on made-up data and tiny models, and print what it breaks."""
    from pruneforge.errors import PruneForgeError, unknown_name
    from pruneforge.interfaces.options import describe_options
    from pruneforge.interfaces.registry import KINDS
    from pruneforge.plugins import loaded_plugins
    from pruneforge.progress import as_progress
    from pruneforge.testing import checked_kinds, run_checks

    registry = loaded_plugins().registry
    kinds = checked_kinds()
    named = [kind for kind in kinds if name in {entry.name for entry in registry.entries(kind)}]
    if not named:
        for kind in KINDS:
            if name in {entry.name for entry in registry.entries(kind)}:
                raise PruneForgeError(
                    f"there are no checks of {kind} {name!r}; those of {', '.join(kinds)} can be checked"
                )
        raise unknown_name("plugin", name, [entry.name for kind in kinds for entry in registry.entries(kind)])
    given = common.assignments(options, "--option")
    for kind in named:
        needed = [field["name"] for field in describe_options(registry.get(kind, name).load()) if field["required"]]
        if set(needed) - set(given):
            wanted = " ".join(f"--option {each}=VALUE" for each in needed)
            raise PruneForgeError(f"{kind} {name!r} is checked with the options that it needs: {wanted}")
    shown = as_progress(common.progress())
    results = list(shown.track(run_checks(registry.create(kind, name, given) for kind in named), "checks"))
    failed = [said for _, said in results if said is not None]
    if as_json:
        print(
            json.dumps([{"check": each.name, "error": said, "left_out": each.skip} for each, said in results], indent=2)
        )
    else:
        run = sum(each.skip is None for each, _ in results)
        table = Table(title=f"{name}: {run - len(failed)} of {run} checks pass", title_justify="left")
        table.add_column("check", overflow="fold")
        table.add_column("result", overflow="fold")
        for each, said in results:
            passed = "passes" if each.skip is None else f"left out: {each.skip}"
            table.add_row(each.name, passed if said is None else said)
        common.console.print(table)
    if failed:
        raise typer.Exit(FAILED)
