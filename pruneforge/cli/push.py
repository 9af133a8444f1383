"""`pruneforge push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pruneforge.cli import common

EXAMPLES = """[bold]Examples[/bold]

pruneforge push pruned --to ORG/NAME --dry-run

pruneforge push pruned --to ORG/NAME --private

pruneforge push study --to ORG/NAME
"""


def push(
    folder: Annotated[Path, typer.Argument(help="Output of a pruning run, or folder of a study.", metavar="DIR")],
    to: Annotated[str, typer.Option(help="Repository on the Hub.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded; needs neither network nor token.")
    ] = False,
    as_json: common.Json = False,
    config: common.Config = None,
) -> None:
    """Upload a pruned model, or a study, to the Hugging Face Hub.

    A folder without a README.md gets a card made from its report, unless the repository has one. Journals, locks,
    hidden files and links out of the folder are left out. A repository that holds something else is refused.
    """
    from pruneforge.studies.push import push as run

    pushed = run(folder, to, private=private, dry_run=dry_run)
    if as_json:
        print(json.dumps(pushed, indent=2))
        return
    for name, size in pushed["files"].items():
        made = " (made from the report)" if name == "README.md" and pushed["card"] else ""
        print(f"{size:>15,}  {name}{made}")
    if pushed["left_out"]:
        print(f"left out: {', '.join(pushed['left_out'])}")
    if "README.md" not in pushed["files"]:
        print("kept the repository's README.md")
    if pushed["removed"]:
        print(f"removed from the repository: {', '.join(pushed['removed'])}")
    total = f"{len(pushed['files'])} files, {common.mebibytes(sum(pushed['files'].values()))}"
    print(f"would push {total} to {to} ({pushed['kind']})" if dry_run else f"pushed {total}: {pushed['url']}")
