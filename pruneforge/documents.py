"""Read what people and programs write: text, JSON and YAML, as data and within limits.

Files come from anywhere, so nothing in them runs code, waits for a pipe, or grows beyond what its text holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pruneforge.errors import PruneForgeError

LARGEST_YAML = 1 << 22
"""Bytes of YAML that are read; more than that is data, and belongs into another format."""

DEEPEST = 64
"""Levels of lists and mappings in YAML."""

MOST_VALUES = 200_000
"""Values of a YAML document, each alias counted as what it stands for."""


def regular_file(path: Path, what: str) -> Path:
    """Return `path` if it is a file that ends: no folder, pipe, socket or device.

    Args:
        path: The path.
        what: What messages call the file.

    Raises:
        PruneForgeError: It is none, or the system refuses to look.
    """
    try:
        if path.is_file():
            return path
        found = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null character
        raise PruneForgeError(f"{what} {str(path)!r} cannot be read: {_reason(error)}") from error
    if found:
        raise PruneForgeError(f"{what} {str(path)!r} is not a regular file")
    raise PruneForgeError(f"{what} {str(path)!r} does not exist")


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        PruneForgeError: It is not a regular file, cannot be read, or is not UTF-8.
    """
    try:
        return regular_file(path, what).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PruneForgeError(f"{what} {str(path)!r} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise PruneForgeError(f"{what} {str(path)!r} cannot be read: {_reason(error)}") from error


def read_json(path: Path, what: str) -> Any:
    """Return what a file of JSON holds.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        PruneForgeError: It cannot be read, or is not JSON.
    """
    return parse_json(read_text(path, what), f"{what} {str(path)!r}")


def parse_json(text: str, what: str) -> Any:
    """Return what JSON holds.

    Args:
        text: The JSON.
        what: What messages call it.

    Raises:
        PruneForgeError: It is not JSON, is nested too deeply, or holds characters that are half of one.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:  # escapes may be surrogates, which cannot be written as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise PruneForgeError(f"{what} is damaged: {_reason(error)}") from error


def read_yaml(path: Path, what: str) -> Any:
    """Return what a file of YAML holds, or of JSON if it is called so.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        PruneForgeError: As `parse_yaml` and `parse_json` say, or the file cannot be read.
    """
    parse = parse_json if path.suffix.lower() == ".json" else parse_yaml
    return parse(read_text(path, what), f"{what} {str(path)!r}")


def parse_yaml(text: str, what: str) -> Any:
    """Return what YAML holds: mappings, lists, text, numbers, truth values and nothing else; a date is text.

    Args:
        text: The YAML.
        what: What messages call it.

    Raises:
        PruneForgeError: It is not YAML, has a tag or the same key twice, or is larger than the limits above.
    """
    import yaml

    try:
        if len(text.encode()) > LARGEST_YAML:
            raise ValueError(f"it is larger than {LARGEST_YAML >> 20} MiB")
        _check_size(text)
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PruneForgeError(f"{what} is not plain YAML: {_reason(error)}") from error


def _check_size(text: str) -> None:
    """Raise unless YAML is within the limits; read event by event, so that nothing is built yet.

    Raises:
        ValueError: It is not.
    """
    import yaml

    sizes: dict[str, int] = {}  # values of each anchor, with what its aliases stand for
    open_nodes: list[tuple[str | None, int]] = []
    values = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"alias {event.anchor!r} stands for nothing before it, or for itself")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor or "", None)  # within itself it does not stand for what it was before
            open_nodes.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = values - before
        if len(open_nodes) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, aliases counted as what they stand for")


def _loader() -> type:
    """Return a safe YAML loader of plain values alone."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    plain = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]

    class Plain(base):
        # Without the resolver of dates, which no setting is.
        yaml_implicit_resolvers: ClassVar = {
            first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
            for first, pairs in base.yaml_implicit_resolvers.items()
        }
        yaml_constructors: ClassVar = {tag: base.yaml_constructors[tag] for tag in [*plain, None]}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key in [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
                if key in seen and key != "<<":
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

    return Plain


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300]
