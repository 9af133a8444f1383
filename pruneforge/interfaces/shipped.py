"""Files that a plugin ships beside its classes: studies, and published numbers."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pruneforge.errors import PruneForgeError

ShippedKind = Literal["study", "published"]
"""What such a file may hold."""


@dataclass(frozen=True)
class Shipped:
    """One file of a plugin.

    Attributes:
        kind: What it holds.
        name: What users call it; published numbers are called as their target.
        target: The file, or `"package:path"` of a file in a package.
        plugin: Name of the plugin that registered it.
    """

    kind: ShippedKind
    name: str
    target: str | Path
    plugin: str

    def read(self) -> str:
        """Return the file's text.

        Raises:
            PruneForgeError: It cannot be read, naming the plugin.
        """
        try:
            if isinstance(self.target, Path):
                return self.target.read_text(encoding="utf-8")
            package, _, path = self.target.partition(":")
            return importlib.resources.files(package).joinpath(path).read_text(encoding="utf-8")
        except Exception as error:  # a plugin's package may fail in any way
            raise PruneForgeError(
                f"{self.kind} {self.name!r} of plugin {self.plugin!r} cannot be read from {self.target}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    def summary(self) -> str:
        """Return the first line of the file, a comment, or why the file cannot be read."""
        try:
            first = self.read().partition("\n")[0]
        except PruneForgeError as error:
            return str(error)
        return first.lstrip("# ") if first.startswith("#") else ""
