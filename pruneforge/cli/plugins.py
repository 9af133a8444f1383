"""`pruneforge plugins`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pruneforge.cli import common

if TYPE_CHECKING:
    from pruneforge.interfaces.shipped import Shipped

EXAMPLES = """[bold]Examples[/bold]

pruneforge plugins

pruneforge plugins NAME OTHER

pruneforge plugins --json -p my_metric.py

PRUNEFORGE_PLUGINS=-NAME pruneforge plugins
"""


def plugins(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="What to show in full: description and options, or a study's text.", metavar="NAME"),
    ] = None,
    as_json: common.Json = False,
    plugins: common.PluginFiles = None,
    config: common.Config = None,
) -> None:
    """List everything that plugins register, by kind, with its plugin; for those named also options, or a study's text.

    `pruneforge compare` runs studies by their names.
    """
    from pruneforge.errors import unknown_name
    from pruneforge.interfaces.registry import KINDS, Entry, plural
    from pruneforge.plugins import loaded_plugins

    installed = loaded_plugins()
    origins = {plugin.name: f"{plugin.origin} {plugin.version}".strip() for plugin in installed.loaded}
    entries = [entry for kind in KINDS for entry in installed.registry.entries(kind)]
    studies = installed.registry.files("study")
    everything: list[Entry | Shipped] = [*entries, *studies]
    known = {each.name for each in everything}
    for name in names or ():
        if name not in known:
            raise unknown_name("plugin name", name, known)
    chosen = [study for study in studies if not names or study.name in names]
    if as_json or names:
        described = installed.describe(*(names or ()))
        if as_json:
            found = {
                "plugins": [vars(plugin) for plugin in installed.loaded],
                "registered": described,
                "studies": [{"name": s.name, "plugin": s.plugin, "summary": s.summary()} for s in chosen],
            }
            print(json.dumps(found, indent=2, default=str))
            return
        for item in described:
            _print_details(item, origins)
        for study in chosen:
            print(study.read(), end="")
    else:
        for kind in (*KINDS, "study"):
            listed = [each for each in everything if each.kind == kind]
            if not listed:
                continue
            table = _table(plural(kind), "name", "what it is", "plugin")
            for each in listed:
                lacking = each.lacking() if isinstance(each, Entry) else None
                said = "\n".join(filter(None, [each.summary(), lacking]))
                table.add_row(each.name, said, f"{each.plugin} ({origins.get(each.plugin, '')})")
            common.console.print(table)
    for plugin in installed.loaded:
        if plugin.error:
            where = f"{plugin.origin} {plugin.version}".strip()
            common.console.print(f"plugin {plugin.name} ({where}) failed to load:")
            common.console.print(plugin.error)


def _print_details(item: dict[str, Any], origins: dict[str, str]) -> None:
    """Print what one registered class is, in full, and its options."""
    print(f"{item['kind']} {item['name']}, of plugin {item['plugin']} ({origins.get(item['plugin'], '')})")
    print("\n".join(filter(None, [item["description"] or item["summary"], item["lacking"]])), end="\n\n")
    if item["argument"]:
        print(f"{item['name']}:VALUE sets {item['argument']}", end="\n\n")
    if not item["options"]:
        return
    table = _table("", "option", "type", "default", "meaning")
    for option in item["options"]:
        value = option["default"]
        number = f"{value:g}" if isinstance(value, float) else common.shown(value)
        default = "required" if option["required"] else number
        table.add_row(option["name"], option["type"].removesuffix("|None"), default, option["description"])
    common.console.print(table)
    print()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
