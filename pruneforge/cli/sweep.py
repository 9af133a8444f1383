"""`pruneforge sweep`.

Its settings are fields of the recipes of pruning and evaluation; only what concerns the command alone is a parameter
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from pruneforge.cli import common, studies
from pruneforge.cli.fields import Fields
from pruneforge.cli.settings import settings

if TYPE_CHECKING:
    from pruneforge.studies.sweep_report import Grid

EXAMPLES = """[bold]Examples[/bold]

pruneforge sweep MODEL --metric NAME --calibration c4 --task perplexity --data wikitext2 --output curve

pruneforge sweep MODEL --metric NAME --metric OTHER --from 0.3 --to 0.8 --step 0.1 --pattern 2:4 --calibration c4
--task perplexity --data wikitext2 --output curve

pruneforge sweep MODEL --metric NAME --scope model --calibration images --task imagenet:images/val --output curve

pruneforge sweep BASE TUNED --metric NAME --calibration c4 --task perplexity --data wikitext2 --output both
"""

NONE = "none"
"""In place of a pattern: no N:M patterns."""

NUMBERS = 32
"""Characters that a mean and a deviation take at most."""


class Command(studies.StudyCommand):
    """`pruneforge sweep`: an option for each setting of its runs."""

    def fields(self) -> Fields:
        """Return the settings; all sparsities share one calibration, of the dense model."""
        return {name: field for name, field in super().fields().items() if name != "propagate"}


def sweep(
    ctx: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(help="Folder or hub id of the model, or of several with the same layers.", metavar="MODEL"),
    ],
    metric: Annotated[
        list[str], typer.Option(help="Name of the metric; `pruneforge plugins` lists them. Repeatable.", metavar="NAME")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for results and report, and for what is finished of them.", metavar="DIR")
    ],
    start: Annotated[float, typer.Option("--from", help="Smallest sparsity.")] = 0.05,
    stop: Annotated[float, typer.Option("--to", help="Largest sparsity.")] = 0.95,
    step: Annotated[float, typer.Option(help="From one sparsity to the next.")] = 0.05,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="N:M pattern beside the curves, or none. Repeatable. (default: of 1:4, 2:4 and 4:8 those that fit all "
            "layers and metrics)"
        ),
    ] = None,
    seeds: studies.Seeds = "0",
    points: Annotated[
        float, typer.Option(help="The knee's rule for shares: percentage points that a model may lose.")
    ] = 1.0,
    loss_increase: Annotated[
        float, typer.Option(help="The knee's rule for other tasks: share by which the loss may rise.")
    ] = 0.05,
    controls: studies.Controls = True,
    executor: studies.Executor = "local",
    workers: studies.Workers = None,
    address: studies.Address = None,
    num_cpus: studies.NumCpus = None,
    num_gpus: studies.NumGpus = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune a model to all sparsities, show the curve, and how far it stays as good as it was.

    The knee of a curve is the largest sparsity such that it and every smaller one stay within a rule: --points for
    shares such as an accuracy, --loss-increase for everything else. All runs of a draw share one pass over the
    calibration data.

    The folder is that of a study: the same command goes on where it stopped, and runs what was added. With several
    models, masks are compared between them.

    Options of the metric, the calibration source and the evaluator are options of the command: --metric NAME
    --task NAME --help lists them. Options of several metrics are written --option NAME.OPTION=VALUE.
    """
    from pruneforge.studies.executors import make_executor
    from pruneforge.studies.knee import Rule
    from pruneforge.studies.report import write_report
    from pruneforge.studies.run import run_study
    from pruneforge.studies.sweep import make_sweep, sparsities_between
    from pruneforge.studies.sweep_report import left_out, write_sweep

    asked = studies.with_options_by_name(settings(ctx), metric)
    rule = Rule(points, loss_increase)
    sparsities = sparsities_between(start, stop, step)
    task = {"task": asked.pop("task"), "options": asked.pop("task_options", {})}
    patterns = [] if pattern == [NONE] else pattern or None
    asked |= {"seeds": studies.numbers(seeds), "controls": controls}
    made = make_sweep(models, metric, task, sparsities, patterns, **asked)
    common.warn(left_out(made))
    where = studies.executor_options(workers=workers, address=address, num_cpus=num_cpus, num_gpus=num_gpus)
    with studies.interruptible(output):
        cells = run_study(made.study, output, progress=common.progress(), executor=make_executor(executor, **where))
    rows = write_report(made.study, cells, output)
    found, grids = write_sweep(made, cells, rows, output, rule)
    failed = studies.warn_of_failed(cells, output)
    if as_json:
        print(json.dumps({**found, "rows": rows}, indent=2))
        raise typer.Exit(studies.SOME_FAILED if failed else 0)
    for grid in grids:
        common.console.print(_table(grid))
        for note in grid.notes:
            print(note)
    print(f"wrote {output / 'sweep.html'}, sweep.md, sweep.json and report.html beside it")
    raise typer.Exit(studies.SOME_FAILED if failed else 0)


def _table(grid: Grid) -> Table:
    """Return a table that breaks long heads and reasons over lines, and no numbers."""
    table = Table(title=grid.title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name, texts in zip(grid.head, zip(*grid.lines, strict=True), strict=True):
        table.add_column(name, justify="right", overflow="fold", min_width=min(NUMBERS, max(map(len, texts))))
    for line in grid.lines:
        table.add_row(*line)
    return table
