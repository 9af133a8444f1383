"""Write what a benchmark found, and say what machine found it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pruneforge.runs.provenance import machine, versions


def made_on(document: dict[str, Any], *packages: str) -> str:
    """Return a line for a page: the machine, and the versions of the packages that matter."""
    system, found = document["machine"], document["versions"]
    made_with = ", ".join(f"{name} {found[name]}" for name in packages)
    return f"Machine: {system['processor']}, {system['cores']} cores; {made_with}."


def with_machine(document: dict[str, Any]) -> dict[str, Any]:
    """Return results with the machine and the versions of all packages."""
    return {**document, "machine": machine(), "versions": versions()}


def write(document: dict[str, Any], results: Path, text: str, page: Path) -> None:
    """Write results as JSON, and the page that shows them."""
    results.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")
