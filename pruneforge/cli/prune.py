"""`pruneforge prune`.

Its settings are fields of the recipe and the resources; only what concerns the command alone is a parameter here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from pruneforge.cli import common, tables
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import OF_RUN, SettingsCommand, settings
from pruneforge.cli.stopping import resumable

if TYPE_CHECKING:
    from pruneforge.runs.estimate import Estimate

EXAMPLES = """[bold]Examples[/bold]

pruneforge prune MODEL --metric NAME --sparsity 0.5 --calibration c4 --output pruned

pruneforge prune MODEL --metric NAME --pattern 2:4 --calibration text.txt --samples 64 --output pruned

pruneforge prune MODEL --metric mine -p mine.py --power 0.5 --calibration c4 --output pruned

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --memory-budget 8GB

pruneforge prune MODEL --metric NAME --sparsity 0.3,0.5 --pattern 2:4 --propagate dense --calibration c4 --output all

pruneforge prune MODEL --metric NAME,OTHER --option OTHER.power=2 --propagate dense --calibration c4 --output both

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --profile

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --observe TRACKER:PROJECT

pruneforge prune MODEL --metric NAME --calibration c4 --dry-run

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --resume

torchrun --nproc-per-node 2 -m pruneforge prune MODEL --metric NAME --calibration c4 --output pruned

pruneforge prune --config pruned/recipe.yaml --seed 1 --output again
"""


class Command(SettingsCommand):
    """`pruneforge prune`: an option for each setting of a run, of its metric and of its calibration source."""

    plugin_options: ClassVar = OF_RUN

    def plugin_named(self, chooser: str, value: Any) -> str | None:
        """Return what a setting names; with several metrics, options say whose they are: `--option NAME.alpha=1`."""
        return None if chooser == "metric" and "," in str(value) else super().plugin_named(chooser, value)

    def fields(self) -> Fields:
        """Return the settings of a recipe, and of resources."""
        from pruneforge.interfaces.recipe import PruneRecipe
        from pruneforge.runs.resources import Resources

        return {**fields_of(PruneRecipe), **fields_of(Resources)}


def prune(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id or file of the model.", metavar="MODEL")],
    metric: Annotated[
        str,
        typer.Option(
            help="Name of the metric, or several with commas between; `pruneforge plugins` lists them.", metavar="NAME"
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to. Must not exist or be empty. Required unless --dry-run.", metavar="DIR"),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Share of weights to prune, in [0, 1); several with commas between. (default: 0.5, or what the "
            "pattern says)",
            metavar="X",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="N:M keeps N of every M consecutive inputs, several with commas between; unstructured if left out.",
            metavar="N:M",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate what the run will take, from a short probe; write nothing.")
    ] = False,
    revision: common.Revision = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune a model in one shot and write an ordinary model folder, its masks and a report.

    Comma-separated metrics, sparsities and N:M patterns give one model each, made in one pass, in folders below
    --output. A single sparsity and a single pattern must agree. Options of several metrics are written
    --option NAME.OPTION=VALUE.

    Options of the metric, the allocator and the calibration source are options of the command: --metric NAME --help
    lists them.
    """
    model = common.at_revision(model, revision)
    asked = settings(ctx) | {"progress": common.progress()}
    for listed in ("refine", "observe"):
        if len(asked.get(listed, ())) > 1:
            name = f"{listed}_options"
            asked[name] = common.options_by_name(asked.get(name, {}), f"--{listed}-option")
    metrics, patterns = _parts(metric), _parts(pattern)
    sparsities = [_sparsity(part) for part in _parts(sparsity)]
    several = max(len(metrics), len(sparsities), len(patterns)) > 1
    if output is None and not dry_run:
        raise typer.BadParameter("Missing option '--output'")
    from pruneforge.interfaces.patterns import DEFAULT_SPARSITY, parse_pattern
    from pruneforge.runs import estimate as estimating
    from pruneforge.runs import prune as pruning

    if several:
        asked = {"propagate": "pruned", **asked}  # as the help says; runs that share a pass need it said otherwise
        if len(metrics) > 1:
            asked["options"] = common.options_by_name(asked.get("options", {}), "--option")
        if len(sparsities) == len(patterns) == 1:  # one pattern, said twice
            parse_pattern(sparsities.pop(), patterns[0], "row")
    else:
        asked |= {"sparsity": next(iter(sparsities), None), "pattern": pattern}
    asked_patterns: list[float | str] = [*sparsities, *patterns] or [DEFAULT_SPARSITY]
    if dry_run:
        if several:
            estimated = estimating.estimate_each(model, metrics, asked_patterns, output=output or "", **asked)
        else:
            estimated = estimating.estimate(model, metric, output=output, **asked)
        _print_estimate(f"{metric} on {model}", estimated, as_json)
        return
    assert output is not None
    with resumable(output):
        if several:
            results = list(pruning.prune_each(model, metrics, asked_patterns, output=output, **asked).values())
        else:
            results = [pruning.prune(model, metric, output=output, **asked)]
    reports = [result.report for result in results if result.report]
    if not reports:
        return  # another process of the group speaks for all
    if as_json:
        print(json.dumps(reports if several else reports[0], indent=2))
        return
    common.warn(list(dict.fromkeys(warning for report in reports for warning in report["warnings"])))
    for result in results:
        tables.print_result(result.report, result.folder or output)
    made_now = [result.report["measured"] for result in results if result.profile is not None]
    if made_now:  # and not finished by an earlier process
        tables.print_shared(made_now[0], asked.get("gradient_cache"))


def _parts(text: str | None) -> list[str]:
    """Return what stands between commas."""
    return [part.strip() for part in text.split(",")] if text is not None else []


def _sparsity(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number", param_hint="--sparsity") from None


def _print_estimate(title: str, estimated: Estimate, as_json: bool) -> None:
    if as_json:
        print(json.dumps(estimated.as_dict(), indent=2))
    else:
        tables.print_estimate(title, estimated)
