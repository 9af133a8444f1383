"""`pruneforge doctor`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from pruneforge.cli import common

EXAMPLES = """[bold]Examples[/bold]

pruneforge doctor

pruneforge doctor --json
"""


def doctor(as_json: common.Json = False, plugins: common.PluginFiles = None, config: common.Config = None) -> None:
    """Show versions, devices, plugins and caches, and what works here."""
    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=2))
        return
    for section, values in findings.items():
        table = Table(title=section, title_justify="left", show_header=False)
        for name, value in values.items():
            table.add_row(name, common.shown(value) or "none")
        common.console.print(table)


def examine() -> dict[str, dict[str, Any]]:
    """Return what this installation has and can do, as JSON types."""
    import torch
    from huggingface_hub import constants

    from pruneforge.interfaces.registry import KINDS, plural
    from pruneforge.plugins import loaded_plugins
    from pruneforge.runs.provenance import machine, versions
    from pruneforge.wide_products import is_fast

    installed = loaded_plugins()
    entries = installed.registry.entries
    cache = Path(constants.HF_HUB_CACHE)
    return {
        "versions": versions(),
        "machine": machine(),
        "plugins": {p.name: f"{p.origin} {p.version}: {'failed' if p.error else 'loaded'}" for p in installed.loaded},
        "registered": {plural(kind): ", ".join(entry.name for entry in entries(kind)) for kind in KINDS},
        "cache": {
            "hub cache": str(cache),
            "writable": os.access(next(p for p in [cache, *cache.parents] if p.exists()), os.W_OK),
            "offline": bool(constants.HF_HUB_OFFLINE),
        },
        "works here": {
            "CUDA": f"{torch.cuda.device_count()} devices"
            if torch.cuda.is_available()
            else "no device; runs on the CPU",
            "bfloat16 on the CPU": _works(lambda: torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2).bfloat16()),
            "bfloat16 products": "fast"
            if is_fast(torch.bfloat16)
            else "slow on this CPU, so a run computes them in float32 and rounds them",
            "factorisation": _works(lambda: torch.linalg.cholesky(torch.eye(4))),
            "every registered name": _imports(),
            "without their library": ", ".join(_named("lacking")) or "none",
        },
    }


def _works(attempt: Callable[[], object]) -> str:
    """Return whether an attempt succeeds, or why it fails."""
    try:
        attempt()
    except RuntimeError as error:
        return f"no: {error}"
    return "yes"


def _imports() -> str:
    broken = _named("error")
    return f"cannot be imported: {', '.join(broken)}" if broken else "imports"


def _named(why: str) -> list[str]:
    """Return the registered names with something under `why` in their description."""
    from pruneforge.plugins import loaded_plugins

    return [f"{item['kind']} {item['name']}" for item in loaded_plugins().describe() if item[why]]
