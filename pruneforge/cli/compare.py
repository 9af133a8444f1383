"""`pruneforge compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pruneforge.cli import common
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import SettingsCommand, settings
from pruneforge.errors import PruneForgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pruneforge.studies.report import Table as StudyTable
    from pruneforge.studies.study import Study

EXAMPLES = """[bold]Examples[/bold]

pruneforge compare study.yaml --output study

with, in study.yaml, models (each with model, calibration, samples, seqlen and tasks), methods (each with metric, and
maybe options, allocator, refine, recover), patterns and seeds

pruneforge compare --preset NAME --output study

pruneforge compare study.yaml --output study --workers 2

pruneforge compare study.yaml --output study --executor ray --address 10.0.0.5:6379

pruneforge compare study.yaml --output study --cells 3/16

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
    cases: Annotated[
        Path | None, typer.Argument(help="YAML study, or list of models with data and tasks.", metavar="FILE")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric of a list of models; repeatable.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of a study: results, report, and what is finished of it.", metavar="DIR"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="In place of FILE, a study that a plugin ships; `pruneforge plugins` lists them.")
    ] = None,
    cells: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only these cells of a study: MODEL/METHOD/PATTERN/SEED with wildcards, or a part of several such "
            "as 2/16; repeatable. The report waits for a call without it.",
            metavar="GLOB|PART",
        ),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="Where the cells of a study run: local, or ray.", metavar="NAME")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes of this machine that run cells side by side.", metavar="N")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; by default RAY_ADDRESS, or a new one here.")
    ] = None,
    num_cpus: Annotated[
        float | None, typer.Option(help="Cores of the Ray cluster that each part of a study asks for.", metavar="N")
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(help="GPUs that each part asks for; by default one if the cluster has any.", metavar="N"),
    ] = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune models alike, whatever their architecture, and show what each method loses.

    A study with --output keeps each finished cell; the same command goes on where it stopped, and runs what was added.
    """
    if (cases is None) == (preset is None):
        raise PruneForgeError("compare takes either a file or the name of a `preset`")
    file = cases or Path(str(preset))
    entries = _read(file, preset)
    asked = {"workers": workers, "address": address, "num_cpus": num_cpus, "num_gpus": num_gpus}
    where = {name: value for name, value in asked.items() if value is not None}
    if isinstance(entries, dict):
        if output is None:
            raise PruneForgeError("a study needs a folder for its cells; name it with `output`")
        study = _study(entries, file, metric, settings(ctx))
        _run(study, output, executor, where, cells or [], as_json)
    elif output is not None or cells or where or executor != "local":
        raise PruneForgeError("`output`, `cells` and `executor` are for a study; a list of models is printed")
    elif not metric:
        raise PruneForgeError("a list of models needs the metrics to compare; name them with `metric`")
    else:
        _cases(entries, file, metric, settings(ctx), as_json)


def _study(values: dict[str, Any], file: Path, metric: list[str] | None, given: dict[str, Any]) -> Study:
    from pruneforge.studies.study import make_study

    others = [*(["metric"] if metric else []), *given]
    if others:
        raise PruneForgeError(f"`{others[0]}` is for a list of models; a study says it in {str(file)!r}")
    return make_study(values, f"study {str(file)!r}")


def _run(study: Study, output: Path, executor: str, where: dict[str, Any], only: Sequence[str], as_json: bool) -> None:
    """Run a study or a part of it, write the report unless other parts may be missing, and print the tables."""
    from pruneforge.studies.executors import make_executor
    from pruneforge.studies.report import tables_of, write_report
    from pruneforge.studies.run import chosen_cells, run_study

    cells = run_study(study, output, progress=True, executor=make_executor(executor, **where), only=only)
    if only:
        print(
            f"{len(chosen_cells(cells, only))} of {len(cells)} cells are in {output}; without --cells comes the report"
        )
        return
    rows = write_report(study, cells, output)
    common.warn(
        [
            f"{row['model']}/{row['method']}/{row['pattern']}/{row['seed']}: {row['failed']}"
            for row in rows
            if row["failed"]
        ]
    )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for table in tables_of(rows, study.compared_with):
        common.console.print(_table(table))
    print(f"wrote {output / 'report.html'}, report.md, report.tex, results.csv and results.json beside it")


def _table(shown: StudyTable) -> Table:
    from pruneforge.studies.report import cell_text, number, pattern_name

    dense = number(shown.dense, shown.share)
    table = Table(title=f"{shown.model}: {shown.title}; dense {dense}", title_justify="left")
    table.add_column("method")
    for pattern in shown.patterns:
        table.add_column(pattern_name(pattern), justify="right")
    for method, line in shown.lines.items():
        texts = []
        for pattern in shown.patterns:
            text = cell_text(line[pattern], shown.share) if pattern in line else ""
            texts.append(f"[bold]{text}[/bold]" if method in shown.best[pattern] else text)
        table.add_row(method, *texts)
    return table


def _cases(entries: Any, file: Path, metric: list[str], given: dict[str, Any], as_json: bool) -> None:
    from pruneforge.runs.compare import Case
    from pruneforge.runs.compare import compare as run

    try:
        cases = [Case(**entry) for entry in entries]
    except TypeError as error:
        raise PruneForgeError(f"cases {str(file)!r} cannot be read: {' '.join(str(error).split())}") from error
    rows = run(cases, metric, **given, progress=True)
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


def _read(path: Path, preset: str | None) -> Any:
    import yaml

    from pruneforge.plugins import loaded_plugins

    try:
        if preset is not None:
            return yaml.safe_load(loaded_plugins().registry.file("study", preset).read())
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PruneForgeError(f"cases {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
