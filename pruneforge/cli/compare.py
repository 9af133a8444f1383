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
    from pruneforge.studies.report import Table as StudyTable

EXAMPLES = """[bold]Examples[/bold]

pruneforge compare study.yaml --output study

with, in study.yaml, models (each with model, calibration, samples, seqlen and tasks), methods (each with metric, and
maybe options, allocator, refine, recover), patterns and seeds

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
    cases: Annotated[Path, typer.Argument(help="YAML study, or list of models with data and tasks.", metavar="FILE")],
    metric: Annotated[list[str] | None, typer.Option(help="Metric of a list of models; repeatable.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of a study: results, report, and what is finished of it.", metavar="DIR"),
    ] = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune models alike, whatever their architecture, and show what each method loses.

    A study with --output keeps each finished cell; the same command goes on where it stopped, and runs what was added.
    """
    entries = _read(cases)
    if isinstance(entries, dict):
        _study(entries, cases, output, metric, settings(ctx), as_json)
    elif output is not None:
        raise PruneForgeError("`output` is for a study; a list of models is printed")
    elif not metric:
        raise PruneForgeError("a list of models needs the metrics to compare; name them with `metric`")
    else:
        _cases(entries, cases, metric, settings(ctx), as_json)


def _study(
    values: dict[str, Any],
    file: Path,
    output: Path | None,
    metric: list[str] | None,
    given: dict[str, Any],
    as_json: bool,
) -> None:
    from pruneforge.studies.report import tables_of, write_report
    from pruneforge.studies.run import run_study
    from pruneforge.studies.study import make_study

    if output is None:
        raise PruneForgeError("a study needs a folder for its cells; name it with `output`")
    others = [*(["metric"] if metric else []), *given]
    if others:
        raise PruneForgeError(f"`{others[0]}` is for a list of models; a study says it in {str(file)!r}")
    study = make_study(values, f"study {str(file)!r}")
    rows = write_report(study, run_study(study, output, progress=True), output)
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


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PruneForgeError(f"cases {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
