"""The same sparsity for all layers, or one that the user wrote."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from pruneforge import Allocator, PruneForgeError
from pruneforge.documents import read_yaml


class Uniform(Allocator):
    """The run's sparsity for every layer; the control of an allocation."""

    def allocate(
        self, measures: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return `sparsity` for each layer."""
        return {name: sparsity for layers in sizes.values() for name in layers}


class FromFile(Allocator):
    """Sparsities from a file: `file:PATH`.

    The file is YAML or JSON, a mapping of layers' names or wildcards to sparsities, the first that matches; or the
    report of a pruned model (`pruneforge.json`), whose layers' sparsities are taken. All are shifted by the same amount
    to the run's sparsity.
    """

    argument: ClassVar[str | None] = "path"

    class Options(Allocator.Options):
        """Options of the file."""

        path: str = Field(description="YAML or JSON file of sparsities, or the report of a pruned model")

    options: Options

    def allocate(
        self, measures: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return each layer's sparsity.

        Raises:
            PruneForgeError: The file cannot be read, or leaves out a layer.
        """
        asked = self._read()
        names = [name for layers in sizes.values() for name in layers]
        matches = {name: next((key for key in asked if fnmatchcase(name, key)), None) for name in names}
        for name, key in matches.items():
            if key is None:
                raise PruneForgeError(f"allocation {self.options.path!r} says nothing of layer {name!r}")
        return {name: asked[key] for name, key in matches.items() if key is not None}

    def _read(self) -> dict[str, float]:
        values = read_yaml(Path(self.options.path), "allocation")
        try:
            if isinstance(values, dict) and isinstance(values.get("layers"), dict):
                values = {name: layer["sparsity"] for name, layer in values["layers"].items()}
            return {str(name): float(value) for name, value in values.items()}
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise PruneForgeError(f"allocation {self.options.path!r} cannot be read: {reason}") from error
