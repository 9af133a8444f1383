"""`pruneforge plugins`."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.table import Table

from pruneforge.cli import common

EXAMPLES = """[bold]Examples[/bold]

pruneforge plugins

pruneforge plugins --json -p my_metric.py

PRUNEFORGE_PLUGINS=-NAME pruneforge plugins
"""


def plugins(as_json: common.Json = False, plugin: common.PluginFiles = None, config: common.Config = None) -> None:
    """List every metric, adapter, source, evaluator and demo, with options, origin and version."""
    common.load_plugin_files(plugin)
    described = describe()
    if as_json:
        print(json.dumps(described, indent=2, default=str))
        return
    for kind in dict.fromkeys(item["kind"] for item in described["registered"]):
        table = Table(title=f"{kind}s", title_justify="left", show_lines=True)
        for column in ("name", "what it is", "options", "plugin"):
            table.add_column(column, overflow="fold")
        for item in described["registered"]:
            if item["kind"] == kind:
                table.add_row(
                    item["name"],
                    item["summary"],
                    _options(item["options"]),
                    _origin(item["plugin"], described),
                )
        common.console.print(table)
    for found in described["plugins"]:
        if found["error"]:
            common.console.print(f"plugin {found['name']} ({_where(found)}) failed to load:", markup=False)
            common.console.print(found["error"], markup=False)


def describe() -> dict[str, Any]:
    """Return all plugins and everything they registered, as JSON types."""
    from pruneforge.errors import PruneForgeError
    from pruneforge.interfaces.options import describe_options
    from pruneforge.interfaces.registry import KINDS
    from pruneforge.plugins import plugins as found

    registered = []
    for kind in KINDS:
        for entry in found().registry.entries(kind):
            item: dict[str, Any] = {"kind": kind, "name": entry.name, "plugin": entry.plugin, "error": None}
            try:
                cls = entry.load()
                item |= {"summary": (inspect.getdoc(cls) or "").split("\n")[0], "argument": cls.argument}
                item["options"] = describe_options(cls)
            except PruneForgeError as error:
                item |= {
                    "summary": f"cannot be imported: {error}",
                    "argument": None,
                    "options": [],
                    "error": str(error),
                }
            registered.append(item)
    loaded = [vars(plugin) for plugin in found().loaded]
    return {"plugins": loaded, "registered": registered}


def _options(options: list[dict[str, Any]]) -> str:
    lines = []
    for option in options:
        default = "required" if option["required"] else option["default"]
        lines.append(f"{option['name']}: {option['type']} = {default}\n  {option['description']}")
    return "\n".join(lines).replace("[", "\\[")


def _origin(name: str, described: dict[str, Any]) -> str:
    return next((f"{name}\n{_where(found)}" for found in described["plugins"] if found["name"] == name), name)


def _where(found: dict[str, Any]) -> str:
    return f"{found['origin']} {found['version']}".strip()
