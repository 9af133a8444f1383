"""`pruneforge compare`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pruneforge.cli import common, studies
from pruneforge.cli.fields import Fields
from pruneforge.cli.settings import settings
from pruneforge.errors import PruneForgeError

if TYPE_CHECKING:
    from pruneforge.studies.study import Study
    from pruneforge.studies.tables import Table as StudyTable

EXAMPLES = """[bold]Examples[/bold]

pruneforge compare study.yaml --output study

with, in study.yaml, models (each with model, calibration, samples, seqlen and tasks), methods (each with metric, and
maybe options, allocator, refine, recover), patterns and seeds

pruneforge compare --preset NAME --output study

pruneforge compare MODEL OTHER --metric NAME --metric OTHER --sparsity 0.5 --pattern 2:4 --calibration c4
--task perplexity --data wikitext2 --output study

pruneforge compare study.yaml --output study --workers 2

pruneforge compare study.yaml --output study --executor ray --address 10.0.0.5:6379

pruneforge compare study.yaml --output study --cells 3/16
"""


class Command(studies.StudyCommand):
    """`pruneforge compare`: an option for each setting that a study on the command line has."""

    def fields(self) -> Fields:
        """Return the settings; a study in a file has its own task, and propagation has the default of studies."""
        fields = {**super().fields()}
        for name, default in (("task", None), ("propagate", "dense")):
            fields[name] = copy.copy(fields[name])
            fields[name].default = default
        return fields


def compare(
    ctx: typer.Context,
    what: Annotated[
        list[str] | None,
        typer.Argument(help="YAML file of a study, or folders or hub ids of models.", metavar="FILE|MODEL"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results, report, and what is finished of them.", metavar="DIR")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="In place of FILE, a study that a plugin ships; `pruneforge plugins` lists them.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric to prune the models by. Repeatable.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Share of weights to prune the models to. Repeatable.")
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="N:M to prune the models to. Repeatable.")] = None,
    seeds: studies.Seeds = "0,1,2",
    controls: studies.Controls = True,
    cells: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only these cells: MODEL/METHOD/PATTERN/SEED with wildcards, or a part of several such as 2/16. "
            "The report waits for a call without it. Repeatable.",
            metavar="GLOB|PART",
        ),
    ] = None,
    trust: Annotated[  # read where it is asked whether somebody typed it
        list[str] | None,
        typer.Option(
            help="Let an option of the study run code, written as it stands there: include_path=DIR. Repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    executor: studies.Executor = "local",
    workers: studies.Workers = None,
    address: studies.Address = None,
    num_cpus: studies.NumCpus = None,
    num_gpus: studies.NumGpus = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune models alike, whatever their architecture, evaluate them, and report what each method loses.

    A study is models x methods x patterns x draws of calibration data: in a YAML file, shipped by a plugin, or, where
    models share data and task, on the command line. Each finished cell is kept in --output; the same command goes on
    where it stopped, and runs what was added.
    """
    from pruneforge.studies.executors import make_executor
    from pruneforge.studies.report import tables_in, write_report
    from pruneforge.studies.run import chosen_cells, run_study

    if output is None:
        raise PruneForgeError("compare needs a folder for its cells; name it with `output`")
    asked = settings(ctx)
    patterns = [*(sparsity or ()), *(pattern or ())]
    given = {"metric": metric, "sparsity": sparsity, "pattern": pattern, **asked}
    for name in ("seeds", "controls"):
        if ctx.get_parameter_source(name).name != "DEFAULT":  # type: ignore[union-attr]
            given[name] = ctx.params[name]
    study = _from_file(what or [], preset, given)
    if study is None:
        asked |= {"seeds": studies.numbers(seeds), "controls": controls}
        study = _of_models(what or [], metric or [], patterns, asked)
    where = studies.executor_options(workers=workers, address=address, num_cpus=num_cpus, num_gpus=num_gpus)
    only = cells or []
    with studies.interruptible(output):
        every = run_study(
            study, output, progress=common.progress(), executor=make_executor(executor, **where), only=only
        )
    if only:
        chosen = chosen_cells(every, only)
        failed = studies.warn_of_failed(chosen, output)
        done = len(chosen) - failed
        if as_json:
            print(json.dumps({"finished": done, "failed": failed, "cells": len(every)}, indent=2))
        else:
            print(f"{done} of {len(every)} cells are finished in {output}; without --cells comes the report")
        raise typer.Exit(studies.SOME_FAILED if failed else 0)
    rows = write_report(study, every, output)
    failed = studies.warn_of_failed(every, output)
    if as_json:
        print(json.dumps(rows, indent=2))
        raise typer.Exit(studies.SOME_FAILED if failed else 0)
    for table in tables_in(study, every, rows, output):
        common.console.print(_table(table))
    print(f"wrote {output / 'report.html'}, report.md, report.tex, results.csv and results.json beside it")
    raise typer.Exit(studies.SOME_FAILED if failed else 0)


def _from_file(what: list[str], preset: str | None, given: dict[str, Any]) -> Study | None:
    """Return the study of a file or a preset; `None` if models are named."""
    from pruneforge.studies.compare import read_study, shipped_study

    files = [name for name in what if name.endswith((".yaml", ".yml"))]
    if preset is None and not files:
        return None
    if len(what) + (preset is not None) > 1:
        raise PruneForgeError("compare takes one file, or the name of one `preset`, or models")
    for name, value in given.items():
        if value is not None:
            raise PruneForgeError(f"`{name}` is for models on the command line; a study says it in its file")
    return shipped_study(preset) if preset is not None else read_study(Path(files[0]))


def _of_models(what: list[str], metric: list[str], patterns: list[float | str], asked: dict[str, Any]) -> Study:
    """Return the study of models that share data and task."""
    from pruneforge.studies.asked import study_values
    from pruneforge.studies.study import make_study

    if not what:
        raise PruneForgeError("compare needs a study: a YAML file, a `preset`, or models with `metric` and `task`")
    for name, value in (("metric", metric), ("task", asked.get("task"))):
        if not value:
            raise PruneForgeError(f"models on the command line need a `{name}`; a study in a file says it there")
    asked = studies.with_options_by_name(asked, metric)
    task = {"task": asked.pop("task"), "options": asked.pop("task_options", {})}
    return make_study(study_values(what, metric, task, patterns or [0.5], **asked))


def _table(shown: StudyTable) -> Table:
    from pruneforge.studies.grids import cell_text, number, pattern_name

    dense = number(shown.dense, shown.share)
    table = Table(title=f"{shown.model}: {shown.title}; dense {dense}", title_justify="left")
    table.add_column("method")
    for pattern in shown.patterns:
        table.add_column(pattern_name(pattern), justify="right")
    for method, line in shown.lines.items():
        texts = []
        for pattern in shown.patterns:
            text = cell_text(line[pattern], shown.share) if pattern in line else ""
            texts.append(Text(text, style="bold" if method in shown.best[pattern] else ""))
        table.add_row(method, *texts)
    return table
