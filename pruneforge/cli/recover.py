"""`pruneforge recover`.

Its settings are fields of the recipe; only what concerns the command alone is a parameter here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from pruneforge.cli import common, tables
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import OF_RUN, SettingsCommand, settings
from pruneforge.cli.stopping import resumable

EXAMPLES = """[bold]Examples[/bold]

pruneforge recover pruned --with NAME --calibration c4 --output recovered

pruneforge recover pruned --with NAME --recover-option steps=1000 --calibration text.txt --output recovered

pruneforge recover pruned --with NAME --calibration c4 --output recovered --resume
"""


class Command(SettingsCommand):
    """`pruneforge recover`: an option for each setting of a recovery, and of what it names."""

    plugin_options: ClassVar = {name: OF_RUN[name] for name in ("calibration", "recover", "objective")}

    def fields(self) -> Fields:
        """Return the settings of a recipe, and what an interrupted run needs."""
        from pruneforge.interfaces.recipe import RecoverRecipe
        from pruneforge.runs.resources import Resources

        return {**fields_of(RecoverRecipe), **fields_of(Resources, "resume")}


def recover(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of the pruned model.", metavar="DIR")],
    recover: Annotated[
        str,
        typer.Option("--with", help="Name of a recovery of the whole model; `pruneforge plugins` lists them."),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder to write to. Must not exist or be empty, unless --resume.", metavar="DIR")
    ],
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Recover a whole model that was pruned before: train what remains, under the masks that its folder holds.

    Options of the recovery and of the calibration source are options of the command: --with NAME --help lists them.
    """
    from pruneforge.runs import recover as recovering

    with resumable(output):
        result = recovering.recover(model, recover, output=output, **settings(ctx) | {"progress": common.progress()})
    if as_json:
        print(json.dumps(result.report, indent=2))
        return
    common.warn(result.report["warnings"])
    tables.print_recovered(result.report, output)
