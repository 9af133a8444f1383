"""`pruneforge new`."""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template
from typing import Annotated, Literal

import typer

from pruneforge.cli import common, templates
from pruneforge.errors import PruneForgeError

Kind = Literal["metric", "allocator", "refiner", "recovery", "objective", "adapter", "source", "evaluator", "observer"]

EXAMPLES = """[bold]Examples[/bold]

pruneforge new metric mine

pruneforge new allocator mine --output plugins/mine

pruneforge new metric mine --single-file
"""


def new(
    kind: Annotated[Kind, typer.Argument(help="What to write.", metavar="KIND")],
    name: Annotated[str, typer.Argument(help="What users will call it.", metavar="NAME")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder, or with --single-file file, to write to. (default: NAME)", metavar="DIR"),
    ] = None,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Write one Python file for -p instead of a package.")
    ] = False,
    config: common.Config = None,
) -> None:
    """Write a plugin that works: a package with an entry point, a method, tests that run the checks, and a README."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise PruneForgeError(f"{name!r} cannot be a plugin's name; use lower-case letters, digits and underscores")
    title = "".join(part.capitalize() for part in name.split("_"))
    package = f"pruneforge_{name}"
    command = "plugins" if kind in templates.UNCHECKED else "check"
    values = {"kind": kind, "name": name, "title": title, "package": package, "distribution": package.replace("_", "-")}
    values["try"] = f"pruneforge {command} {name}"
    method = f'"""The {kind} {name}."""\n\n{templates.METHODS[kind]}'
    if single_file:
        files = {output or Path(f"{name}.py"): method}
    else:
        folder = output or Path(name)
        files = {
            folder / "pyproject.toml": templates.PYPROJECT,
            folder / "README.md": templates.README,
            folder / package / "__init__.py": templates.INIT,
            folder / package / f"{kind}.py": method,
            folder / "tests" / f"test_{name}.py": templates.TESTS[kind],
        }
    taken = [path for path in files if path.exists()]
    if taken:
        raise PruneForgeError(f"{str(taken[0])!r} is there already; name another place with `output`")
    first = next(iter(files))
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(values), encoding="utf-8")
    except OSError as error:
        raise PruneForgeError(
            f"{str(first)!r} cannot be written: {error.strerror}; name another place with `output`"
        ) from error
    if single_file:
        print(f"wrote {first}; try: pruneforge {command} {title.lower()} -p {first}")
    else:
        print(f"wrote {first.parent}; next: cd {first.parent} && pip install -e .")
        print(f"then: {values['try']}")
