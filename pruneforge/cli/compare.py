"""`pruneforge compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pruneforge.cli import common
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import SettingsCommand, settings
from pruneforge.errors import PruneForgeError

EXAMPLES = """[bold]Examples[/bold]

pruneforge compare cases.yaml --metric NAME --metric OTHER --pattern 2:4

with, in cases.yaml, a list of models, each with model, calibration, task, and task_options, samples, seqlen, name
"""


class Command(SettingsCommand):
    """`pruneforge compare`: an option for each setting that all its runs share."""

    def fields(self) -> Fields:
        """Return settings of the pruning recipe."""
        from pruneforge.interfaces.recipe import PruneRecipe

        return fields_of(PruneRecipe, "metric", "sparsity", "pattern", "options", "device", "seed")


def compare(
    ctx: typer.Context,
    cases: Annotated[Path, typer.Argument(help="YAML list of models with their data and tasks.", metavar="FILE")],
    metric: Annotated[list[str], typer.Option(help="Name of a metric; repeatable.")],
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune several models alike, whatever their architecture, and show what each lost in one table."""
    from pruneforge.runs.compare import compare as run

    rows = run(_cases(cases), metric, **settings(ctx), progress=True)
    common.warn([f"{row['model']}, {row['metric']}: {text}" for row in rows for text in row["warnings"]])
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{len(rows)} runs", title_justify="left")
    for column in ("model", "metric", "pattern"):
        table.add_column(column)
    for column in ("sparsity", "dense loss", "loss", "loss increase", "accuracy lost"):
        table.add_column(column, justify="right")
    for row in rows:
        lost = "" if row["accuracy_lost"] is None else f"{row['accuracy_lost']:.2%}"
        table.add_row(
            row["model"],
            row["metric"],
            row["pattern"],
            f"{row['sparsity']:.2%}",
            f"{row['dense_loss']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['loss_increase']:+.1%}",
            lost,
        )
    common.console.print(table)


def _cases(path: Path) -> list[Any]:
    import yaml

    from pruneforge.runs.compare import Case

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [Case(**entry) for entry in entries]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise PruneForgeError(f"cases {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
