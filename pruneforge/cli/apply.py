"""`pruneforge apply`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pruneforge.cli import common, tables
from pruneforge.cli.stopping import resumable

EXAMPLES = """[bold]Examples[/bold]

pruneforge apply published MODEL --output pruned

pruneforge apply pruneforge.masks MODEL --output pruned

pruneforge apply published fine-tuned --any-model --output pruned
"""


def apply(
    masks: Annotated[
        Path, typer.Argument(help="Output of a pruning run, or its pruneforge.masks.", metavar="DIR|FILE")
    ],
    model: Annotated[str, typer.Argument(help="Folder or hub id of the dense model.", metavar="MODEL")],
    output: Annotated[Path, typer.Option(help="Folder to write to. Must not exist or be empty.", metavar="DIR")],
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Take another model than the report beside the masks names.")
    ] = False,
    masks_only: Annotated[
        bool,
        typer.Option("--masks-only", help="Go on if the run that made the masks updated weights, which this does not."),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Layers to leave dense that have no mask, as names with wildcards.", metavar="GLOB"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in --output.")] = False,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Make a pruned model from published masks and the dense model, without calibration data.

    The report beside the masks says which model was pruned, and whether weights were updated as well, which masks alone
    do not give back: both are errors unless asked for. Without a report, a warning says what is not checked.
    """
    from pruneforge.runs.apply import apply as run

    with resumable(output):
        result = run(
            masks,
            model,
            output,
            any_model=any_model,
            masks_only=masks_only,
            exclude=exclude or (),
            device=device,
            resume=resume,
            progress=common.progress(),
        )
    if not result.report:
        return  # another process of the group speaks for all
    if as_json:
        print(json.dumps(result.report, indent=2))
        return
    common.warn(result.report["warnings"])
    tables.print_result(result.report, output)
