"""`pruneforge inspect` and `pruneforge diff`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pruneforge.cli import common

INSPECT_EXAMPLES = """[bold]Examples[/bold]

pruneforge inspect pruned

pruneforge inspect pruned --layers

pruneforge inspect pruned --against other --json
"""

DIFF_EXAMPLES = """[bold]Examples[/bold]

pruneforge diff pruned other
"""


def inspect(
    folder: Annotated[Path, typer.Argument(help="Output of a pruning run.", metavar="DIR")],
    against: Annotated[
        Path | None, typer.Option(help="Another output, whose masks are compared.", metavar="DIR")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer, not only those of the same role.")] = False,
    as_json: common.Json = False,
    config: common.Config = None,
) -> None:
    """Show what the masks of a pruned model look like: sparsity, patterns, structure, dead rows and columns, sizes."""
    from pruneforge.runs.inspect import inspect as run

    found = run(folder, against)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    agreement = found.get("agreement")
    print_masks(found, layers, agreement["layers"] if agreement and layers else {}, f"masks of {folder}")
    sizes = found["bytes"]
    print(
        f"pruned layers: {common.mebibytes(sizes['dense'])} dense, {common.mebibytes(sizes['packed'])} as kept values "
        f"and one bit a weight; masks {sizes['masks']:,} bytes, compressed {sizes['masks_compressed']:,}"
    )
    if agreement:
        print(
            f"{agreement['same']:.2%} of the weights are kept or pruned alike in {against}; of those that either "
            f"prunes, {agreement['jaccard']:.2%} are pruned by both"
        )


def print_masks(found: dict[str, Any], layers: bool, agreement: dict[str, Any], title: str) -> None:
    """Print what the masks of each layer, or of each role in the blocks, look like.

    Args:
        found: What `pruneforge.inspect` returned.
        layers: Whether to show each layer.
        agreement: Agreement with another model's mask, by layer, or nothing.
        title: Title of the table.
    """
    items = [*(found["layers"] if layers else found["components"]).items(), ("all", found["all"])]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "weights": lambda item: f"{item['weights']:,}",
        "sparsity": lambda item: f"{item['sparsity']:.2%}",
        "rows": lambda item: f"{item['rows']:.1%}",
        "columns": lambda item: f"{item['columns']:.1%}",
        "random": lambda item: f"{item['random_rows']:.1%}, {item['random_columns']:.1%}",
    }
    if found["all"]["dead_rows"] or found["all"]["dead_columns"]:
        columns["dead"] = lambda item: f"{item['dead_rows']}, {item['dead_columns']}"
    if found["all"]["patterns"]:
        columns["patterns"] = lambda item: ", ".join(item["patterns"])
    if found["all"]["permuted_patterns"]:
        columns["permuted"] = lambda item: ", ".join(item["permuted_patterns"])
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("layer")
    for name in [*columns, *(["agreement"] if agreement else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, item in items:
        same = [f"{agreement[name]['same']:.2%}" if name in agreement else ""] if agreement else []
        table.add_row(name, *(cell(item) for cell in columns.values()), *same)
    common.console.print(table)
    print("rows, columns: share of the mask's variance that they explain; random: the same of a random mask")


def diff(
    first: Annotated[Path, typer.Argument(help="Output of a pruning run.", metavar="DIR")],
    second: Annotated[Path, typer.Argument(help="Output of another one.", metavar="DIR")],
    as_json: common.Json = False,
    config: common.Config = None,
) -> None:
    """Say in words how two runs differ: recipe, data, versions, sparsity, evaluation."""
    from pruneforge.runs.inspect import diff as run

    lines = run(first, second)
    if as_json:
        print(json.dumps(lines, indent=2))
        return
    for line in lines or [f"{first} and {second} differ in nothing but what was measured"]:
        print(line)
