"""What a study shows of the layers of a model: of one pattern and one calibration draw, so that it stays small."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruneforge.runs.inspect import role
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.plan import Cell

Curves = dict[str, dict[str, dict[int, float]]]
"""By role and method, a value for each block."""

ROUNDING = 1.0
"""By how many points sparsities of layers may differ because each row prunes whole weights."""

DEPTHS = 5
"""Layers whose scores are shown, spread evenly over the blocks."""


@dataclass(frozen=True)
class Picture:
    """A part of a mask, as a picture.

    Attributes:
        method: Name of the method.
        layer: Name of the layer.
        shape: Rows and columns that are shown.
        png: The picture, PNG in base64.
    """

    method: str
    layer: str
    shape: tuple[int, int]
    png: str


@dataclass(frozen=True)
class Layers:
    """The layers of a model, pruned by each method to one pattern with one calibration draw.

    Attributes:
        pattern: The pattern.
        seed: The draw.
        sparsity: Sparsity of each layer, in percent; layers of one role in one block, such as experts, by their mean.
        error: Relative squared error of each layer's output, where it was measured.
        histograms: By method, distributions of scores of some layers by name, in the order of the blocks.
        pictures: Parts of masks.
    """

    pattern: str
    seed: int
    sparsity: Curves
    error: Curves
    histograms: dict[str, dict[str, Mapping[str, Any]]]
    pictures: list[Picture]

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sparsity, but for rounding to whole weights."""
        every = [value for methods in self.sparsity.values() for line in methods.values() for value in line.values()]
        return max(every, default=0.0) - min(every, default=0.0) < ROUNDING


def layers_of(cells: Sequence[Cell], held: StudyFolder, model: str, pattern: str) -> Layers | None:
    """Return what is known of the layers of a model at a pattern, of the study's first draw; `None` if nothing is.

    Args:
        cells: The study's cells.
        held: What they found.
        model: Name of the model.
        pattern: The pattern, as rows name it.
    """
    seed = cells[0].seed
    chosen = [cell for cell in cells if (cell.model, str(cell.pattern), cell.seed) == (model, pattern, seed)]
    found = {cell.method: held.cell(cell) or {} for cell in chosen}
    finished = {method: each for method, each in found.items() if "masks" in each}
    if not finished:
        return None
    details = {method: each.get("details", {}) for method, each in finished.items()}
    errors = {method: {name: layer["error"] for name, layer in known.items()} for method, known in details.items()}
    sparsities = {method: _percent(each["masks"]["layers"]) for method, each in finished.items()}
    pictures = [
        Picture(method, each["picture"]["layer"], tuple(each["picture"]["shape"]), each["picture"]["png"])
        for method, each in finished.items()
        if "picture" in each
    ]
    return Layers(pattern, seed, _by_role(sparsities), _by_role(errors), _histograms(details), pictures)


def _percent(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: 100 * share for name, share in shares.items()}


def _by_role(values: Mapping[str, Mapping[str, float | None]]) -> Curves:
    """Return values of layers, by method and name, as curves over the blocks."""
    gathered: dict[str, dict[str, dict[int, list[float]]]] = {}
    for method, layers in values.items():
        for name, value in layers.items():
            if value is not None:
                curves = gathered.setdefault(_kind(name), {}).setdefault(method, {})
                curves.setdefault(_block(name), []).append(value)
    return {
        kind: {
            method: {block: sum(of_block) / len(of_block) for block, of_block in sorted(curve.items())}
            for method, curve in curves.items()
        }
        for kind, curves in gathered.items()
    }


def _kind(name: str) -> str:
    """Return a layer's role, that of an expert without its number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", role(name))


def _block(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _histograms(details: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return distributions of scores of some layers, of the role of the layer in the middle."""
    scored = {
        method: {name: layer["scores"] for name, layer in layers.items() if layer["scores"]}
        for method, layers in details.items()
    }
    names = list(dict.fromkeys(name for layers in scored.values() for name in layers))
    same = [name for name in names if _kind(name) == _kind(names[len(names) // 2])]
    steps = min(DEPTHS, len(same))
    spread = dict.fromkeys(same[step * (len(same) - 1) // max(1, steps - 1)] for step in range(steps))
    shown = {method: {name: layers[name] for name in spread if name in layers} for method, layers in scored.items()}
    return {method: layers for method, layers in shown.items() if layers}
