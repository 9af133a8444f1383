"""`pruneforge prune`."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pruneforge.cli import common
from pruneforge.errors import PruneForgeError

EXAMPLES = """[bold]Examples[/bold]

pruneforge prune MODEL --metric NAME --sparsity 0.5 --calibration c4 --output pruned

pruneforge prune MODEL --metric NAME --pattern 2:4 --calibration text.txt --samples 64 --output pruned

pruneforge prune MODEL --metric mine -p mine.py --option power=0.5 --calibration c4 --output pruned

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --memory-budget 8GB

pruneforge prune MODEL --metric NAME --sparsity 0.3,0.5 --pattern 2:4 --propagate dense --calibration c4 --output all

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --profile

pruneforge prune MODEL --metric NAME --calibration c4 --dry-run

pruneforge prune MODEL --metric NAME --calibration c4 --output pruned --resume

torchrun --nproc-per-node 2 -m pruneforge prune MODEL --metric NAME --calibration c4 --output pruned

pruneforge prune --config pruned/recipe.yaml --seed 1 --output again
"""


class Propagate(str, Enum):
    """What calibration sees of the earlier blocks."""

    pruned = "pruned"
    dense = "dense"


def prune(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model.", metavar="MODEL")],
    metric: Annotated[str, typer.Option(help="Name of the metric; `pruneforge plugins` lists them.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; absent or empty. Needed but for --dry-run.", metavar="DIR")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Share of weights to prune, in [0, 1). (default: 0.5, or what the pattern says)"),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M keeps N of every M consecutive inputs; unstructured if left out.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Source or file of the calibration data.", metavar="SOURCE|PATH")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences or images to draw.")] = 128,
    seqlen: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a sequence. (default: the model's context, at most 2048)"),
    ] = None,
    batch_size: common.BatchSize = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the metric; repeatable.", metavar="NAME=VALUE")
    ] = None,
    source_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the calibration source; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on a corrupt image; short for --source-option strict=true.")
    ] = False,
    adapter_option: Annotated[
        list[str] | None, typer.Option(help="Option of the model's adapter; repeatable.", metavar="NAME=VALUE")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave layers dense, by name with wildcards; repeatable.", metavar="GLOB"),
    ] = None,
    propagate: Annotated[
        Propagate, typer.Option(help="Whether calibration sees earlier blocks pruned or dense.")
    ] = Propagate.pruned,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the output folder, if there is one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will take, from a short probe; write nothing.")
    ] = False,
    as_json: common.Json = False,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="What the run may take in host memory, such as 3GB. (default: most of what is free)"),
    ] = None,
    device_memory_budget: Annotated[
        str | None, typer.Option(help="The same for the CUDA device. (default: most of what is free)")
    ] = None,
    gradient_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps gradient statistics for later runs. (default: the user's cache)"),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show time and memory by stage and block; leave a trace for Perfetto.")
    ] = False,
    plugin: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """Prune a model in one shot and write an ordinary model folder, its masks and a report.

    Several sparsities or N:M patterns, with commas between, are made in one pass, each in a folder below --output: then
    --sparsity 0.3,0.5 --pattern 2:4 are three. One of each is one, and they have to agree.
    """
    options = common.assignments(option, "--option")
    source_options = common.assignments(source_option, "--source-option") | ({"strict": True} if strict else {})
    common.quieten()
    common.load_plugin_files(plugin)
    settings: dict[str, Any] = {
        "samples": samples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "options": options,
        "source_options": source_options,
        "adapter_options": common.assignments(adapter_option, "--adapter-option"),
        "exclude": exclude or [],
        "propagate": propagate.value,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "output": output,
        "resume": resume,
        "memory_budget": memory_budget,
        "device_memory_budget": device_memory_budget,
        "gradient_cache": gradient_cache,
        "progress": True,
    }
    sparsities, patterns = _sparsities(sparsity), [part.strip() for part in pattern.split(",")] if pattern else []
    several = len(sparsities) > 1 or len(patterns) > 1
    if not several:
        settings |= {"sparsity": next(iter(sparsities), None), "pattern": pattern}
    if dry_run:
        if several:
            raise PruneForgeError("--dry-run takes one sparsity or pattern")
        _estimate(model, metric, calibration, settings, as_json)
        return
    if output is None:
        raise typer.BadParameter("Missing option '--output'")
    from pruneforge.checkpoint.journal import JOURNAL_FILE
    from pruneforge.runs import prune as pruning

    settings |= {"calibration": calibration, "profile": profile}
    try:
        if several:
            results = list(pruning.prune_each(model, metric, [*sparsities, *patterns], **settings).values())
        else:
            results = [pruning.prune(model, metric, **settings)]
    except KeyboardInterrupt:
        if not any(output.rglob(JOURNAL_FILE)):
            raise
        print(f"pruneforge: interrupted; {output} holds what is finished, go on with --resume", file=sys.stderr)
        raise typer.Exit(common.INTERRUPTED) from None
    reports = [result.report for result in results if result.report]
    if not reports:
        return  # another process of the group speaks for all
    if as_json:
        print(json.dumps(reports if several else reports[0], indent=2))
        return
    common.warn(list(dict.fromkeys(warning for report in reports for warning in report["warnings"])))
    for result in results:
        _say(result.report, result.folder or output)
    of_this_run = [result.report["measured"] for result in results if result.profile is not None]
    if of_this_run:  # and not of one that was finished before
        _say_of_all(of_this_run[0], gradient_cache)


def _sparsities(text: str | None) -> list[float]:
    found = []
    for part in text.split(",") if text is not None else []:
        try:
            found.append(float(part))
        except ValueError:
            raise typer.BadParameter(f"{part.strip()!r} is no number", param_hint="--sparsity") from None
    return found


def _say(report: dict[str, Any], output: Path) -> None:
    """Print what became of one pattern."""
    measured = report["measured"]
    print(
        f"pruned {report['sparsity']['pruned']:,} of {report['sparsity']['weights']:,} weights "
        f"({report['sparsity']['reached']:.2%}) in {measured['seconds']['total']:.1f} s, "
        f"peak memory {common.mebibytes(measured['peak_memory']['host_bytes'])}; wrote {output}"
    )


def _say_of_all(measured: dict[str, Any], gradient_cache: Path | None) -> None:
    """Print what the run kept, and its profile."""
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


def _estimate(model: str, metric: str, calibration: str | None, settings: dict[str, Any], as_json: bool) -> None:
    from rich.table import Table

    from pruneforge.runs.estimate import estimate

    found = estimate(model, metric, calibration, **settings)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    table = Table(title=f"{metric} on {model}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("blocks", f"{found.blocks:,}")
    table.add_row("layers to prune", f"{found.layers:,}")
    table.add_row("weights to prune", f"{found.pruned:,} of {found.weights:,}")
    table.add_row("peak host memory", common.mebibytes(found.host_bytes))
    table.add_row("peak device memory", common.mebibytes(found.device_bytes) if found.device_bytes else "none")
    table.add_row("disk", common.mebibytes(found.disk_bytes))
    for stage, seconds in found.seconds.items():
        table.add_row(f"time: {stage}", f"{seconds:,.1f} s")
    table.add_row("time, but for writing", f"{sum(found.seconds.values()):,.1f} s")
    common.console.print(table)
