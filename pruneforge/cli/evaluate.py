"""`pruneforge eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.table import Table

from pruneforge.cli import common
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import SettingsCommand, settings

EXAMPLES = """[bold]Examples[/bold]

pruneforge eval pruned --task perplexity --data wikitext2 --window 2048

pruneforge eval pruned --task lm-eval:hellaswag,arc_easy --limit 100

pruneforge eval pruned --task zero-shot-7 --output seven.json

pruneforge eval --config seven.json
"""


class Command(SettingsCommand):
    """`pruneforge eval`: an option for each setting of an evaluation and of its evaluator."""

    plugin_options: ClassVar = {"task": ("evaluator", "options")}

    def fields(self) -> Fields:
        """Return the settings of a recipe."""
        from pruneforge.interfaces.recipe import EvalRecipe

        return fields_of(EvalRecipe)


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id or file of a model, dense or pruned.", metavar="MODEL")],
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for the results and the recipe that repeats them.", metavar="FILE"),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            help="File for a record of each image, window or question, one JSON object a line.", metavar="FILE"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are no results of an evaluation.")] = False,
    revision: common.Revision = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Evaluate a model with a task's own harness.

    Options of the evaluator are options of the command: --task NAME --help lists them.
    """
    from pruneforge.runs.evaluate import evaluate as run

    model = common.at_revision(model, revision)
    asked = settings(ctx)
    outcome = run(model, output=output, items=items or False, force=force, progress=common.progress(), **asked)
    common.warn(outcome["warnings"])
    if as_json:
        print(json.dumps(outcome, indent=2))
        return
    table = Table(title=f"{asked['task']} of {model}", show_header=False, title_justify="left")
    for name, value in _flat(outcome):
        table.add_row(name, value)
    common.console.print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if prefix == "" and name in ("task", "recipe", "versions", "warnings"):
            continue
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        else:
            rows.append((prefix + name, common.shown(value)))
    return rows
