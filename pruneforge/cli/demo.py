"""`pruneforge demo`."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.table import Table

from pruneforge.cli import common, tables
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import SettingsCommand, settings

EXAMPLES = """[bold]Examples[/bold]

pruneforge demo

pruneforge demo --json -p my_metric.py
"""

PATTERNS = (None, "2:4")


class Command(SettingsCommand):
    """`pruneforge demo`: an option for the device."""

    def fields(self) -> Fields:
        """Return the setting of a recipe."""
        from pruneforge.interfaces.recipe import PruneRecipe

        return fields_of(PruneRecipe, "device")


def demo(
    ctx: typer.Context,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune the embedded models with every metric there is, at 50 % and 2:4; needs no network.

    Metrics that compare the calibration data with others are left out, since there are none.
    """
    from pruneforge.interfaces.statistics import streams_of
    from pruneforge.plugins import loaded_plugins
    from pruneforge.progress import as_progress
    from pruneforge.runs.loading import parse_device

    parse_device(settings(ctx).get("device", "auto"))  # before anything is said
    registry = loaded_plugins().registry
    results, metrics = {}, []
    progress = as_progress(common.progress())
    for entry in registry.entries("metric"):
        streams = streams_of(registry.create("metric", entry.name).requires)
        if streams:
            common.warn([f"{entry.name} is left out: it needs further calibration data, {', '.join(streams)}"])
        else:
            metrics.append(entry.name)
    for entry in registry.entries("demo"):
        subject = registry.create("demo", entry.name)
        rows = run(subject, metrics, settings(ctx), progress)
        results[entry.name] = {"title": subject.title, "rows": rows}
        if not as_json:
            common.console.print(_table(subject.title, subject.result, rows))
    if as_json:
        print(json.dumps(results, indent=2))


def run(subject: Any, metrics: list[str], asked: dict[str, Any], progress: Any) -> list[dict[str, Any]]:
    """Return a row of results for the dense model and for each metric and pattern."""
    from pruneforge.runs.evaluate import evaluate
    from pruneforge.runs.prune import prune

    asked = {**asked, "progress": progress}
    data = {"calibration": subject.calibration, "samples": subject.samples, "seqlen": subject.seqlen}
    model, result = subject.checkpoint(), subject.result
    dense = evaluate(model, subject.task, subject.task_options, **asked)
    rows = [{"metric": "dense", "pattern": "", "sparsity": 0.0, result: dense[result]}]
    jobs = [(pattern, metric) for pattern in PATTERNS for metric in metrics]
    for pattern, metric in progress.track(jobs, subject.title):
        pruned = prune(model, metric, 0.5, pattern, **data, **asked)
        common.warn([f"{metric}: {text}" for text in pruned.report["warnings"]])
        found = evaluate(pruned, subject.task, subject.task_options, **asked)
        measured = pruned.report["measured"]
        rows.append(
            {
                "metric": metric,
                "pattern": pruned.report["pattern"]["pattern"],
                "sparsity": pruned.report["sparsity"]["reached"],
                result: found[result],
                "seconds": tables.waited(measured),
                "peak_memory_bytes": measured["peak_memory"]["host_bytes"],
            }
        )
    return rows


def _table(title: str, result: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("metric", "pattern", result, "sparsity reached", "seconds", "peak memory"):
        table.add_column(column, justify="left" if column in ("metric", "pattern") else "right")
    for row in rows:
        seconds, peak = row.get("seconds"), row.get("peak_memory_bytes")
        table.add_row(
            row["metric"],
            row["pattern"],
            f"{row[result]:.2%}" if result.startswith("top") else f"{row[result]:.2f}",
            f"{row['sparsity']:.2%}",
            "" if seconds is None else f"{seconds:.1f}",
            "" if peak is None else common.mebibytes(peak),
        )
    return table
