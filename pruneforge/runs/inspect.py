"""`pruneforge.inspect` and `pruneforge.diff`: what a pruned model's masks look like, and how two runs differ."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneforge.checkpoint.masks import load_masks, load_permutations, pack, packed_bytes
from pruneforge.engine.structure import Structure, random_structure, structure_of, together
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.patterns import NM
from pruneforge.runs.places import check_place
from pruneforge.runs.report_file import REPORT_FILE, load_report

PATTERNS = (NM(2, 4), NM(4, 8), NM(1, 4))
"""Patterns that are looked for in each mask."""

MEASURED = ("measured", "identity", "plugins", "layers")
"""Parts of a report that say nothing new about how two runs differ, or that are compared otherwise."""


def inspect(folder: str | Path, against: str | Path | None = None) -> dict[str, Any]:
    """Describe the masks of a pruned model.

    Args:
        folder: The output of a pruning run.
        against: The output of another one of the same model, to compare the masks with.

    Returns:
        `layers` and `components` (layers of the same role in all blocks), each by name with `weights`, `sparsity`,
        `rows` and `columns` (shares of the mask's variance that they explain, see `engine.structure`), `random_rows`
        and `random_columns` (of a random mask), `dead_rows`, `dead_columns`, `patterns` (those that the mask
        satisfies) and `permuted_patterns` (those that it satisfies in the order of columns that the folder keeps);
        `all` for all layers together; `bytes` with the size of the pruned layers `dense`, `packed` (the values that
        are kept and one bit a weight) and `masks` and `masks_compressed` (by zlib); with `against`, also `agreement`
        with `same` (share of weights that both keep or both prune) and `jaccard` (of what is pruned) for all layers
        and for each.

    Raises:
        PruneForgeError: A folder is not the output of a pruning run, or the two are of models with other layers.
    """
    masks, report = _read(_place(folder))
    permutations = load_permutations(Path(folder))
    roles: dict[str, list[str]] = {}
    for name in masks:
        roles.setdefault(role(name), []).append(name)

    def described(names: Sequence[str]) -> dict[str, Any]:
        permuted = [masks[name][:, permutations[name]] for name in names if name in permutations]
        return _described([masks[name] for name in names], permuted)

    found = {
        "recipe": report["recipe"],
        "all": described(list(masks)),
        "components": {name: described(of_role) for name, of_role in roles.items()},
        "layers": {name: described([name]) for name in masks},
        "bytes": _bytes(masks, report),
    }
    if against is not None:
        other, _ = _read(_place(against))
        found["agreement"] = agreement(masks, other, str(folder), str(against))
    return found


def masks_in_short(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the sparsity of each layer, and the structure of all masks beside that of random ones."""
    found, control = (together(map(of_mask, masks.values())) for of_mask in (structure_of, random_structure))
    layers = {name: 1 - float(mask.double().mean()) for name, mask in masks.items()}
    return {**_shares(found, ""), **_shares(control, "random_"), "layers": layers}


def agreement(one: Mapping[str, Tensor], two: Mapping[str, Tensor], first: str, second: str) -> dict[str, Any]:
    """Return how far two models lost the same weights.

    Args:
        one: Masks of a model, boolean [out, in] by layer name, `True` keeps.
        two: Masks of another one with the same layers.
        first: What messages call the first.
        second: What messages call the other one.

    Returns:
        `same` (share of weights that both keep or both prune), `jaccard` (share that both prune of what either does;
        1 if none is pruned) and the same for each of the `layers`.

    Raises:
        PruneForgeError: A layer differs in size or is in one of them alone.
    """
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (one, two)]
    if shapes[0] != shapes[1]:
        other = sorted(shapes[0].items() ^ shapes[1].items())[0][0]
        raise PruneForgeError(
            f"{first!r} and {second!r} cannot be compared: layer {other!r} differs in size or is in one"
        )
    counts = {name: _count_alike(mask, two[name]) for name, mask in one.items()}
    whole = [sum(each) for each in zip(*counts.values(), strict=True)]
    return {**_agree(*whole), "layers": {name: _agree(*count) for name, count in counts.items()}}


def diff(first: str | Path, second: str | Path) -> list[str]:
    """Return how two runs differ, one line for each difference, from their reports.

    Args:
        first: The output of a pruning run.
        second: The output of another one.

    Raises:
        PruneForgeError: A folder holds no report.
    """
    reports = [_report(_place(folder)) for folder in (first, second)]
    one, two = ({key: value for key, value in report.items() if key not in MEASURED} for report in reports)
    lines = list(_differences(one, two, ""))
    sparsities = [{name: layer["sparsity"] for name, layer in report["layers"].items()} for report in reports]
    changed = [name for name in sparsities[0] if name in sparsities[1] and sparsities[0][name] != sparsities[1][name]]
    if changed:
        largest = max(changed, key=lambda name: abs(sparsities[0][name] - sparsities[1][name]))
        before, after = (sparsity[largest] for sparsity in sparsities)
        lines.append(f"{len(changed)} layers differ in sparsity, {largest} most: {before:.2%} and {after:.2%}")
    for name in sorted(sparsities[0].keys() ^ sparsities[1].keys()):
        lines.append(f"layer {name} is pruned in the {'first' if name in sparsities[0] else 'second'} alone")
    return lines


def role(name: str) -> str:
    """Return a layer's name without the number of its block, and without what stands before it."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def _place(folder: str | Path) -> Path:
    check_place(str(folder))
    return Path(folder)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_masks(folder), _report(folder)


def _report(folder: Path) -> dict[str, Any]:
    report = load_report(folder)
    if report is None:
        raise PruneForgeError(f"{str(folder)!r} holds no {REPORT_FILE}; it is not the output of a pruning run")
    return report


def _described(masks: list[Tensor], permuted: list[Tensor]) -> dict[str, Any]:
    """Describe some masks; `permuted` are the same with their columns permuted, where the folder keeps an order."""
    weights, kept = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    found = together(structure_of(mask) for mask in masks)
    control = together(random_structure(mask) for mask in masks)
    return {
        "weights": weights,
        "sparsity": 1 - kept / weights,
        **_shares(found, ""),
        **_shares(control, "random_"),
        "dead_rows": sum(int((~mask).all(1).sum()) for mask in masks),
        "dead_columns": sum(int((~mask).all(0).sum()) for mask in masks),
        "patterns": _patterns(masks),
        "permuted_patterns": _patterns(permuted),
    }


def _patterns(masks: list[Tensor]) -> list[str]:
    """Return the patterns that all masks satisfy; none if there is no mask."""
    return [str(pattern) for pattern in PATTERNS if masks and all(_fits(mask, pattern) for mask in masks)]


def _shares(structure: Structure, prefix: str) -> dict[str, float]:
    return {f"{prefix}rows": structure.rows, f"{prefix}columns": structure.columns}


def _fits(mask: Tensor, pattern: NM) -> bool:
    """Return whether at most N of every M consecutive inputs are kept."""
    if mask.shape[1] % pattern.m:
        return False
    return bool((mask.reshape(mask.shape[0], -1, pattern.m).sum(-1) <= pattern.n).all())


def _bytes(masks: Mapping[str, Tensor], report: Mapping[str, Any]) -> dict[str, int]:
    value = torch.empty(0, dtype=getattr(torch, report["model"]["dtype"])).element_size()
    weights, kept = sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    bits = sum(packed_bytes((mask.shape[0], mask.shape[1])) for mask in masks.values())
    compressed = sum(len(zlib.compress(pack(mask).tobytes())) for mask in masks.values())
    return {
        "dense": weights * value,
        "packed": kept * value + bits,
        "masks": bits,
        "masks_compressed": compressed,
    }


def _count_alike(one: Tensor, two: Tensor) -> tuple[int, int, int, int]:
    """Return how many weights there are, how many are kept or pruned alike, pruned by both, and pruned by either."""
    both, either = int((~(one | two)).sum()), int((~(one & two)).sum())
    return one.numel(), one.numel() - either + both, both, either


def _agree(weights: int, alike: int, both: int, either: int) -> dict[str, float]:
    return {"same": alike / weights, "jaccard": both / either if either else 1.0}


def _differences(one: Any, two: Any, name: str) -> list[str]:
    """Return a line for each value that differs."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        lines = []
        for key in [*one, *(key for key in two if key not in one)]:
            lines += _differences(one.get(key), two.get(key), f"{name} {key}".strip())
        return lines
    if one == two:
        return []
    return [f"{name}: {_short(one)} and {_short(two)}"]


def _short(value: Any) -> str:
    text = "nothing" if value in (None, [], {}) else str(value)
    return text if len(text) <= 60 else f"{text[:56]}..."
