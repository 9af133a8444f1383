"""`pruneforge demo`."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from pruneforge.cli import common

EXAMPLES = """[bold]Examples[/bold]

pruneforge demo

pruneforge demo --json -p my_metric.py
"""

PATTERNS = (None, "2:4")


def demo(
    as_json: common.Json = False,
    device: common.Device = "auto",
    plugin: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune the embedded model with every metric there is, at 50 % and 2:4; needs no network."""
    common.quieten()
    common.load_plugin_files(plugin)
    from pruneforge.plugins import plugins
    from pruneforge.progress import BarProgress

    registry = plugins().registry
    results = {}
    for entry in registry.entries("demo"):
        subject = registry.create("demo", entry.name)
        rows = run(subject, [metric.name for metric in registry.entries("metric")], device, BarProgress())
        results[entry.name] = {"title": subject.title, "rows": rows}
        if not as_json:
            common.console.print(_table(subject.title, subject.result, rows))
    if as_json:
        print(json.dumps(results, indent=2))


def run(subject: Any, metrics: list[str], device: str, progress: Any) -> list[dict[str, Any]]:
    """Return a row of results for the dense model and for each metric and pattern."""
    from pruneforge.evaluating import evaluate
    from pruneforge.pruning import prune

    def measure(model: Any) -> float:
        outcome = evaluate(model, subject.task, options=subject.task_options, device=device, progress=progress)
        common.warn(outcome["warnings"])
        return outcome[subject.result]

    rows: list[dict[str, Any]] = [
        {"metric": "dense", "pattern": "", "sparsity": 0.0, subject.result: measure(subject.checkpoint())}
    ]
    jobs = [(metric, pattern) for pattern in PATTERNS for metric in metrics]
    for metric, pattern in progress.track(jobs, subject.title):
        pruned = prune(
            subject.checkpoint(),
            metric,
            0.5,
            pattern,
            subject.calibration,
            samples=subject.samples,
            seqlen=subject.seqlen,
            device=device,
            progress=progress,
        )
        report = pruned.report
        common.warn(report["warnings"])
        rows.append(
            {
                "metric": metric,
                "pattern": report["pattern"]["pattern"],
                "sparsity": report["sparsity"]["reached"],
                subject.result: measure(pruned),
                "seconds": report["measured"]["seconds"]["total"],
                "peak_memory_bytes": report["measured"]["peak_memory"]["host_bytes"],
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
            f"{row[result]:.2f}",
            f"{row['sparsity']:.2%}",
            "" if seconds is None else f"{seconds:.1f}",
            "" if peak is None else common.mebibytes(peak),
        )
    return table
