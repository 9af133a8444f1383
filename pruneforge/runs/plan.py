"""The runs of a job, each with its pattern and folder, and the layers that they leave dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.run import Run
from pruneforge.runs.method import Method, sees_activations
from pruneforge.runs.recipe_file import validated


def make_runs(
    recipes: Mapping[str, PruneRecipe], methods: Mapping[str, Method], patterns: Sequence[float | str], folder: Path
) -> list[Run]:
    """Return a run for each metric and pattern, with a folder of its own below `folder`.

    Args:
        recipes: The settings with each metric, by label.
        methods: The metrics, with what goes with them, by label.
        patterns: Sparsities and "N:M".
        folder: Its folders are called "0.5" or "2of4", after the label if there are several metrics.

    Raises:
        PruneForgeError: There is none, one comes twice, or they would share nothing.
    """
    several = len(methods) * len(patterns) > 1
    runs: dict[str, Run] = {}
    for label, method in methods.items():
        recipe = recipes[label]
        for asked in patterns:
            sparsity, text = (None, asked) if isinstance(asked, str) else (asked, None)
            own = validated(PruneRecipe, **{**recipe.model_dump(), "sparsity": sparsity, "pattern": text})
            run = method.run(own, None)
            if several and recipe.propagate == "pruned" and sees_activations(run):
                raise PruneForgeError(
                    "with pruned propagation each run changes what the next block sees, so several share nothing; "
                    "add `propagate` dense, or make a run for each"
                )
            pattern = str(run.pattern).replace(":", "of")
            name = pattern if len(methods) == 1 else f"{label}-{pattern}"
            if name in runs:
                raise PruneForgeError(f"pattern {run.pattern} is asked for twice")
            run.folder = folder / name
            runs[name] = run
    if not runs:
        raise PruneForgeError("no pattern is asked for; name at least one, such as 0.5 or 2:4")
    return list(runs.values())


def split_excluded(blocks: list[Block], exclude: Sequence[str]) -> tuple[list[Block], list[Layer]]:
    """Return the blocks without the layers that `exclude` names with wildcards, and those layers.

    Raises:
        PruneForgeError: A pattern matches no layer, or all layers.
    """
    layers = [layer for block in blocks for layer in block.layers]
    for glob in exclude:
        if not any(fnmatchcase(layer.name, glob) for layer in layers):
            raise PruneForgeError(f"exclude={glob!r} matches no layer; layers have names such as {layers[0].name!r}")
    out = {layer.name for layer in layers if any(fnmatchcase(layer.name, glob) for glob in exclude)}
    if len(out) == len(layers):
        raise PruneForgeError(f"exclude={', '.join(exclude)} leaves no layer to prune")
    kept = [replace(block, layers=tuple(la for la in block.layers if la.name not in out)) for block in blocks]
    return kept, [layer for layer in layers if layer.name in out]
