"""The parts of the documentation that are generated from the package, as Markdown.

Nothing here imports Sphinx; `generated.py` puts these texts into the pages.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.text import Text

import pruneforge

# The only internal names that the documentation needs.
from pruneforge.cli import app
from pruneforge.interfaces.recipe import EvalRecipe, PruneRecipe, RecoverRecipe
from pruneforge.interfaces.registry import plural
from pruneforge.runs.resources import Resources
from pruneforge.studies.grids import pattern_name
from pruneforge.studies.published import Published, published_numbers

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```\{generated\} (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A generated part of a page: the name of a function in `PARTS`, and a body that a code host shows instead."""


def expand(page: str) -> str:
    """Return a page with its generated parts filled in.

    Raises:
        KeyError: A part has an unknown name.
    """
    return FENCE.sub(lambda match: PARTS[match[1]](match[2]), page)


def api(body: str) -> str:
    """Return an autodoc directive for each public name in `body`, one name per line."""
    return "\n".join(f"```{{eval-rst}}\n{_autodoc(name)}\n```\n" for name in body.split())


def _autodoc(name: str) -> str:
    item = public(name)
    if inspect.isclass(item):
        bases = "\n   :show-inheritance:" if item.__bases__ != (object,) else ""
        return f".. autoclass:: pruneforge.{name}\n   :members:\n   :exclude-members: model_config{bases}"
    return f".. {'autofunction' if inspect.isroutine(item) else 'py:data'}:: pruneforge.{name}"


def public(name: str) -> Any:
    """Return what `from pruneforge import name` gives at first, even if a module of that name hides it by now."""
    return pruneforge.__getattr__(name)


def api_problems() -> Iterator[str]:
    """Yield what the reference lacks: public names without a place on the page, or without a docstring."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = {name for part, body in FENCE.findall(page) if part == "api" for name in body.split()}
    for name in sorted(set(pruneforge.__all__) - listed):
        yield f"public name {name!r} is missing from docs/reference/api.md"
    for name in pruneforge.__all__:
        yield from (f"{path} has no docstring" for path in _undocumented(name, public(name)))


def _undocumented(path: str, item: Any) -> Iterator[str]:
    """Yield the public functions and classes at and below `item` that have no docstring, not even an inherited one."""
    if callable(item) and not isinstance(item, type) and not inspect.isroutine(item):
        return  # an object such as `hookimpl`, whose class another library documents
    if not inspect.getdoc(item):
        yield path
    if inspect.isclass(item):
        for name, member in vars(item).items():
            documented = name.startswith("_") or inspect.getdoc(getattr(item, name))
            if (inspect.isroutine(member) or isinstance(member, property)) and not documented:
                yield f"{path}.{name}"


def commands(body: str) -> str:
    """Return every command with its arguments, options and examples, from its own help."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("pruneforge", [], resilient_parsing=True)
    parts = []
    for name, command in group.commands.items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        usage = " ".join(inner.get_usage().split()).removeprefix("Usage: ")
        parts += [f"## pruneforge {name}", _paragraphs(command.help), f"```text\n{usage}\n```"]
        parts.append(_table(("option", "meaning"), [(_code(flag), text) for flag, text in _records(command, inner)]))
        examples = Text.from_markup(command.epilog).plain.split("\n\n")
        parts += ["Examples:", "```text\n{}\n```".format("\n".join(line.strip() for line in examples[1:]))]
    return "\n\n".join(parts) + "\n"


def _records(command: Any, context: Any) -> list[tuple[str, str]]:
    """Return the flags and the help of every parameter of a command."""
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    return [(flags, " ".join(text.split())) for flags, text in records]


def recipes(body: str) -> str:
    """Return the settings of the recipes, and of the resources beside them."""
    parts = []
    for title, model in (("prune", PruneRecipe), ("recover", RecoverRecipe), ("eval", EvalRecipe)):
        parts += [f"## Settings of `pruneforge {title}`", _settings(model)]
    parts += [
        "## Resources of `pruneforge prune`",
        "Settings that do not decide the output. A recipe may hold them; none that PruneForge writes does.",
        _settings(Resources),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(model: type[BaseModel]) -> str:
    rows = []
    for name, setting in model.model_fields.items():
        if setting.exclude:
            continue
        default = json.dumps(setting.get_default(call_default_factory=True), default=str)
        default = "required" if setting.is_required() else _code(default)
        rows.append((_code(name), _code(_type(setting.annotation)), default, setting.description or ""))
    return _table(("setting", "type", "default", "meaning"), rows)


def _type(annotation: Any) -> str:
    """Return a type as a recipe's reader knows it: `int or null`, `pruned or dense`, `list of str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    return "null" if annotation is NoneType else getattr(origin or annotation, "__name__", str(annotation))


def plugins(body: str) -> str:
    """Return every registered name with its options, from `pruneforge plugins --json`.

    Raises:
        RuntimeError: A plugin cannot be loaded.
    """
    command = [sys.executable, "-m", "pruneforge", "plugins", "--json"]
    described = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    failed = [item["name"] for item in described["plugins"] + described["registered"] if item["error"]]
    if failed:
        raise RuntimeError(f"plugins that cannot be loaded: {', '.join(failed)}")
    parts = []
    for kind in dict.fromkeys(item["kind"] for item in described["registered"]):
        parts.append(f"## {plural(kind).capitalize()}")
        for item in described["registered"]:
            if item["kind"] == kind:
                parts += [f"### `{item['name']}`", item["summary"]]
                if item["argument"]:
                    parts.append(f"`{item['name']}:VALUE` sets `{item['argument']}`.")
                parts += [_options(item["options"])] if item["options"] else []
    studies = [(_code(study["name"]), study["summary"]) for study in described["studies"]]
    parts += ["## Studies", _table(("study", "what it compares"), studies)]
    return "\n\n".join(parts) + "\n"


def _options(options: list[dict[str, Any]]) -> str:
    rows = []
    for option in options:
        default = "required" if option["required"] else _code(json.dumps(option["default"]))
        rows.append((_code(option["name"]), _code(option["type"]), default, option["description"]))
    return _table(("option", "type", "default", "meaning"), rows)


def published(body: str) -> str:
    """Return every published number, a table for each publication and protocol."""
    parts = []
    for table, numbers in groupby(published_numbers(), key=lambda n: (n.source, n.measure, n.data, n.window)):
        source, measure, data, window = table
        listed = list(numbers)
        protocol = ", ".join(map(_code, dict.fromkeys((measure, listed[0].task))))
        protocol += f" on {_code(data)}" if data else ""
        protocol += f" in windows of {window} tokens" if window else ""
        seen = ", ".join(f"{name} {value}" for name, value in listed[0].recipe.items())
        protocol += f", {listed[0].images:,} images" if listed[0].images else ""
        protocol += f", calibrated with {seen}" if seen else ""
        protocol += ", second hand" if listed[0].second_hand else ""
        parts += [f"## {source}", f"{protocol}.", _published_table(listed)]
    return "\n\n".join(parts) + "\n"


def _published_table(numbers: Sequence[Published]) -> str:
    """Return the table of models and methods by patterns."""
    rows: dict[tuple[str, str], dict[float | str, str]] = {}
    for number in numbers:
        rows.setdefault((number.model, number.method), {})[number.pattern] = f"{number.value:g}"
    patterns = list(dict.fromkeys(number.pattern for number in numbers))
    head = ["model", "method", *(pattern_name(str(pattern)) for pattern in patterns)]
    return _table(head, [[*place, *(row.get(pattern, "") for pattern in patterns)] for place, row in rows.items()])


def root(body: str) -> str:
    """Return the file of the repository's root that `body` names, its links made relative to `docs/`."""
    text = (ROOT / body.strip()).read_text(encoding="utf-8")
    return re.sub(r"(?<=\]\()(?!https?:|#)([^)]+)", _from_docs, text)


def _from_docs(link: re.Match[str]) -> str:
    path = link[1].removeprefix("docs/") if link[1].startswith("docs/") else link[1].lower()
    return path if (ROOT / "docs" / path).is_file() else f"../{link[1]}"


PARTS: dict[str, Callable[[str], str]] = {
    "api": api,
    "commands": commands,
    "recipes": recipes,
    "plugins": plugins,
    "published": published,
    "root": root,
}
"""What pages can ask for, by name. Each function receives the body of the directive."""


def _code(text: str) -> str:
    return f"`{text}`"


def _paragraphs(text: str) -> str:
    return "\n\n".join(_escape(" ".join(part.split())) for part in text.split("\n\n"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _escape(text: str) -> str:
    """Escape what Markdown would read as markup, outside of code, and make code of options."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<!\S)(--\w[\w-]*)", r"`\1`", re.sub(r"([*_<\[])", r"\\\1", part)) for part in parts[::2]]
    return "`".join(parts)
