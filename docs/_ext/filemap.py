"""Keep the tables of `docs/map.md` as the first lines of the files say: `python docs/_ext/filemap.py`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "map.md"
MARKER = "<!-- made by docs/_ext/filemap.py -->\n"


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring.

    Raises:
        ValueError: It has none.
    """
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring")
    return docstring.splitlines()[0].replace("|", "\\|")


def tables() -> str:
    """Return a table of each room's files, and one of the plugins."""
    parts = []
    for room in [ROOT / "pruneforge", *sorted(path.parent for path in (ROOT / "pruneforge").glob("*/__init__.py"))]:
        files = [file for file in sorted(room.glob("*.py")) if not file.name.startswith("__")]
        title = f"### `{room.relative_to(ROOT).as_posix()}/`\n\n{first_line(room / '__init__.py')}\n\n"
        parts.append(title + _table("file", [(file.name, first_line(file)) for file in files]))
    plugins = sorted((ROOT / "plugins").glob("*/__init__.py"))
    rows = [(f"{file.parent.name}/", first_line(file)) for file in plugins]
    return "\n".join([*parts, f"### `plugins/`\n\n{_table('folder', rows)}"])


def _table(what: str, rows: list[tuple[str, str]]) -> str:
    return "".join([f"| {what} | content |\n|---|---|\n", *(f"| `{name}` | {text} |\n" for name, text in rows)])


def expected() -> str:
    """Return the page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(MARKER)[0] + MARKER + "\n" + tables()


def named_paths() -> list[str]:
    """Return the files and folders that the page names before the tables."""
    written = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    return [path for path in re.findall(r"`([\w/.]+)`", written) if "/" in path]


if __name__ == "__main__":
    PAGE.write_text(expected(), encoding="utf-8")
