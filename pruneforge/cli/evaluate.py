"""`pruneforge eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pruneforge.cli import common

EXAMPLES = """[bold]Examples[/bold]

pruneforge eval pruned --task perplexity --data wikitext2 --window 2048

pruneforge eval pruned --task lm-eval:hellaswag,arc_easy --limit 100

pruneforge eval pruned --task zero-shot-7 --output seven.json

pruneforge eval --config seven.json
"""


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model, pruned or dense.", metavar="MODEL")],
    task: Annotated[str, typer.Option(help="Evaluator, or evaluator:argument; `pruneforge plugins` lists them.")],
    data: Annotated[
        str | None, typer.Option(help="Source or file of the evaluation data.", metavar="SOURCE|PATH")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window. (default: the context, at most 2048)")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of local task definitions.", metavar="DIR")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many windows, documents or images.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Further option of the evaluator; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    source_option: Annotated[
        list[str] | None, typer.Option(help="Option of the data's source; repeatable.", metavar="NAME=VALUE")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on a corrupt image; short for --source-option strict=true.")
    ] = False,
    batch_size: common.BatchSize = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for the results and the recipe that repeats them.", metavar="FILE"),
    ] = None,
    as_json: common.Json = False,
    plugin: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Evaluate a model with a task's own harness."""
    options = common.assignments(option, "--option")
    source_options = common.assignments(source_option, "--source-option") | ({"strict": True} if strict else {})
    common.quieten()
    common.load_plugin_files(plugin)
    from pruneforge.runs.evaluate import evaluate as run

    outcome = run(
        model,
        task,
        data=data,
        window=window,
        include_path=include_path,
        limit=limit,
        options=options,
        source_options=source_options,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        output=output,
        progress=True,
    )
    common.warn(outcome["warnings"])
    if as_json:
        print(json.dumps(outcome, indent=2))
        return
    table = Table(title=f"{task} of {model}", show_header=False, title_justify="left")
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
            rows.append((prefix + name, f"{value:.4f}" if isinstance(value, float) else str(value)))
    return rows
