"""What the masks of a study's cells say: what is pruned by component, and how far several models lose the same."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruneforge.checkpoint.masks import load_masks
from pruneforge.runs.inspect import agreement, role
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.plan import Cell


@dataclass(frozen=True)
class Components:
    """Which components of a model a method prunes, where it chooses.

    Attributes:
        model: Name of the model.
        method: Name of the method.
        shares: By pattern, the share pruned of all layers of each role, mean over calibration draws; `all` of all.
    """

    model: str
    method: str
    shares: dict[str, dict[str, float]]


def components(cells: Sequence[Cell], held: StudyFolder, shapes: Mapping[str, tuple[int, int]]) -> list[Components]:
    """Return what is pruned by component, for methods that compare several layers or have an allocator.

    Args:
        cells: The cells.
        held: What they found.
        shapes: The shape (out, in) of each layer, by name.
    """
    found = []
    for (model, method), patterns in _by_method(cells, held).items():
        every = [(cell, outcome) for drawn in patterns.values() for cell, outcome in drawn]
        if any(outcome["scope"] in ("block", "model") or cell.recipe.allocator for cell, outcome in every):
            shares = {
                pattern: _mean([_by_role(outcome["masks"]["layers"], shapes) for _, outcome in drawn])
                for pattern, drawn in patterns.items()
            }
            found.append(Components(model, method, shares))
    return found


def _by_role(sparsities: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Return the share pruned of the weights of each role in the blocks, and of all."""
    sizes: dict[str, int] = {}
    pruned: dict[str, float] = {}
    for layer, sparsity in sparsities.items():
        size = shapes[layer][0] * shapes[layer][1]
        for name in (role(layer), "all"):
            sizes[name] = sizes.get(name, 0) + size
            pruned[name] = pruned.get(name, 0) + size * sparsity
    order = sorted(sizes, key=lambda name: name == "all")
    return {name: pruned[name] / sizes[name] for name in order}


@dataclass(frozen=True)
class Similarity:
    """How far a method prunes the same weights of two models.

    Attributes:
        models: Names of the two.
        method: Name of the method.
        pattern: Sparsity or N:M.
        jaccard: Share of weights pruned in both, of those pruned in either; mean over calibration draws.
        same: Share of weights that both keep or both prune.
        chance: The `jaccard` to expect of random masks with the same sparsities of layers.
    """

    models: tuple[str, str]
    method: str
    pattern: str
    jaccard: float
    same: float
    chance: float


def similarities(cells: Sequence[Cell], held: StudyFolder) -> Iterator[Similarity]:
    """Yield how far masks of each two models agree, by method and pattern, on the draws that both have.

    Raises:
        PruneForgeError: A finished cell's masks are missing.
    """
    finished = _by_method(cells, held)
    for models in itertools.combinations(dict.fromkeys(cell.model for cell in cells), 2):
        for method in dict.fromkeys(cell.method for cell in cells):
            one, two = (finished.get((model, method), {}) for model in models)
            for pattern, drawn in one.items():
                other = {cell.seed: cell for cell, _ in two.get(pattern, [])}
                pairs = [(cell, other[cell.seed]) for cell, _ in drawn if cell.seed in other]
                if pairs:
                    yield Similarity(models, method, pattern, **_mean([_alike(*pair, held) for pair in pairs]))


def _alike(one: Cell, two: Cell, held: StudyFolder) -> dict[str, float]:
    first, second = (load_masks(held.masks(cell)) for cell in (one, two))
    found = agreement(first, second, one.key, two.key)
    both = either = 0.0
    for name, mask in first.items():
        shares = [1 - float(each.double().mean()) for each in (mask, second[name])]
        expected = shares[0] * shares[1]
        both += mask.numel() * expected
        either += mask.numel() * (sum(shares) - expected)
    return {"jaccard": found["jaccard"], "same": found["same"], "chance": both / either if either else 1.0}


Finished = dict[str, list[tuple[Cell, dict[str, Any]]]]
"""Cells and what they found, by pattern."""


def _by_method(cells: Sequence[Cell], held: StudyFolder) -> dict[tuple[str, str], Finished]:
    """Return the finished cells by model and method."""
    found: dict[tuple[str, str], Finished] = {}
    for cell in cells:
        outcome = held.cell(cell)
        if outcome is not None and "failed" not in outcome:
            found.setdefault((cell.model, cell.method), {}).setdefault(str(cell.pattern), []).append((cell, outcome))
    return found


def _mean(drawn: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value over calibration draws."""
    return {name: statistics.fmean(each[name] for each in drawn) for name in drawn[0]}
