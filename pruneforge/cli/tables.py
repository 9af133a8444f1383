"""What `pruneforge prune` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneforge.cli import common

if TYPE_CHECKING:
    from pruneforge.runs.estimate import Estimate


def print_result(report: dict[str, Any], output: Path) -> None:
    """Print what became of one run, from its report."""
    measured = report["measured"]
    print(
        f"pruned {report['sparsity']['pruned']:,} of {report['sparsity']['weights']:,} weights "
        f"({report['sparsity']['reached']:.2%}) in {waited(measured):.1f} s, "
        f"peak memory {common.mebibytes(measured['peak_memory']['host_bytes'])}; wrote {output}"
    )
    if "trained" in report.get("recovery", {}):
        print(trained(report["recovery"]))


def print_recovered(report: dict[str, Any], output: Path) -> None:
    """Print what the last recovery of a pruned model did."""
    entry, measured = report["recovered"][-1], report["measured"]["recovered"][-1]
    print(f"{trained(entry)} in {waited(measured, 'recover'):.1f} s; wrote {output}")


def waited(measured: dict[str, Any], work: str = "total") -> float:
    """Return the seconds that the user waited: for the work, which alone is compared as speed, and what came before."""
    return sum(measured["seconds"].get(stage, 0.0) for stage in ("load", "data", work))


def trained(recovery: dict[str, Any]) -> str:
    """Return what a recovery of a whole model trained, in words."""
    count = recovery["trained"]
    share = f"{count['share']:.2%} as many as the model has"
    return f"{recovery['name']} trained {count['parameters']:,} parameters, {share}, in {recovery['steps']:,} steps"


def print_shared(measured: dict[str, Any], gradient_cache: str | None) -> None:
    """Print what runs of one pass kept for later runs, and their profile."""
    from pruneforge.engine.gradient_store import cache_folder

    added = measured["gradient_cache"].get("added_bytes", 0)
    if added:
        where = gradient_cache or cache_folder()
        print(f"kept gradient statistics for later runs, {common.mebibytes(added)} below {where}")
    if "profile" in measured:
        common.console.print(_profile_table(measured["profile"]))


def _profile_table(rows: list[dict[str, Any]]) -> Any:
    """Return seconds by block and stage, with the most memory seen in each."""
    from rich.table import Table

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    blocks = sorted({row["block"] for row in rows}, key=lambda block: -1 if block is None else block)
    memory = "device_bytes" if any(row["device_bytes"] for row in rows) else "host_bytes"
    table = Table(title="seconds by block and stage, and most memory in MiB")
    for name in ("block", *stages, "MiB"):
        table.add_column(name, justify="left" if name == "block" else "right", no_wrap=True)

    def add(name: str, chosen: list[dict[str, Any]]) -> None:
        seconds = {stage: sum(row["seconds"] for row in chosen if row["stage"] == stage) for stage in stages}
        cells = [f"{seconds[stage]:.2f}" if seconds[stage] else "" for stage in stages]
        table.add_row(name, *cells, common.mebi(max(row[memory] for row in chosen)))

    for block in blocks:
        add("all" if block is None else str(block), [row for row in rows if row["block"] == block])
    add("sum", rows)
    peaks = [max(row[memory] for row in rows if row["stage"] == stage) for stage in stages]
    table.add_row("MiB", *map(common.mebi, peaks))
    return table


def print_estimate(title: str, estimated: Estimate) -> None:
    """Print what a run will take."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("blocks", f"{estimated.blocks:,}")
    table.add_row("layers to prune", f"{estimated.layers:,}")
    times = f"{estimated.models} x " if estimated.models > 1 else ""
    table.add_row("weights to prune", f"{estimated.pruned:,} of {times}{estimated.weights:,}")
    table.add_row("peak host memory", common.mebibytes(estimated.host_bytes))
    table.add_row("peak device memory", common.mebibytes(estimated.device_bytes) if estimated.device_bytes else "none")
    table.add_row("disk", common.mebibytes(estimated.disk_bytes))
    for stage, seconds in estimated.seconds.items():
        table.add_row(f"time: {stage}", f"{seconds:,.1f} s")
    table.add_row("time, but for writing", f"{sum(estimated.seconds.values()):,.1f} s")
    common.console.print(table)
