"""`pruneforge.evaluate`: measure a model by a task's own harness."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneforge.checkpoint.durable import write_text
from pruneforge.checkpoint.reader import INDEX, SINGLE, Checkpoint
from pruneforge.documents import read_json
from pruneforge.errors import DeviceFullError, PruneForgeError
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.evaluator import Evaluator, Subject
from pruneforge.interfaces.recipe import EvalRecipe
from pruneforge.interfaces.registry import Registry
from pruneforge.memory import free_memory, one_line_for_full_devices
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress, as_progress
from pruneforge.runs import provenance
from pruneforge.runs import report_file as reports
from pruneforge.runs.documented import documented
from pruneforge.runs.loading import in_evaluation_mode, load_model, parse_device, parse_dtype
from pruneforge.runs.recipe_file import validated
from pruneforge.runs.result import PruneResult
from pruneforge.wide_products import wide_products

LARGEST_RESULT = 1 << 26
"""Size in bytes of the largest file that may be the results of an evaluation."""


@documented(EvalRecipe)
def evaluate(  # noqa: D417 -- the settings are described where they are declared
    model: str | Path | nn.Module | PruneResult,
    task: str,
    options: Mapping[str, Any] | None = None,
    *,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    items: str | Path | bool = False,
    force: bool = False,
    progress: bool | Progress = False,
    processor: Any = None,
    **more_options: Any,
) -> dict[str, Any]:
    """Evaluate a model with a task's own harness.

    The results for a folder that `prune` wrote are added to its report.

    Args:
        model: A folder, a hub id, a model in memory, or what `prune` returned.
        output: JSON file to write the results to, with the recipe that repeats them.
        items: File to write a record of each item to (an image, a window of text, a question), one JSON object a line;
            or `True` to return the records, lists by column, as `items` of the results.
        force: Whether files that are there may be replaced, other than by `output` earlier results.
        progress: `True` for bars on a terminal, and lines elsewhere.
        processor: Tokenizer or image transform of a model in memory.
        more_options: Further options of the evaluator, by name, such as `data` and `window` of the perplexity.
        {settings}

    Returns:
        The evaluator's results, with `task`, `recipe`, `versions` and `warnings`.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit; nothing has been written.
    """
    installed = loaded_plugins()
    given = {name: str(v) if isinstance(v, Path) else v for name, v in more_options.items() if v not in (None, {})}
    for name in given.keys() & dict(options or {}).keys():
        raise PruneForgeError(f"option {name!r} is given twice")
    given = {**(options or {}), **given}
    evaluator: Evaluator = installed.registry.create("evaluator", task, given)
    target, _ = parse_device(device), parse_dtype(dtype)
    _check_writable([Path(file) for file in (output, items) if file is not None and not isinstance(file, bool)], force)
    if isinstance(model, PruneResult):
        loaded, report, folder = model.loaded, model.report, None
    else:
        with as_progress(progress).stage("loading the model"):
            loaded = load_model(model, dtype, processor, installed.registry)
        folder = Path(loaded.reference) if Path(loaded.reference).is_dir() else None
        report = ({} if isinstance(model, nn.Module) else reports.find_report(loaded.reference)) or {}
    recipe = validated(
        EvalRecipe,
        model=loaded.reference,
        task=task,
        options=given,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        plugins=[plugin.origin for plugin in installed.loaded if plugin.from_file],
    )
    home = next(loaded.module.parameters()).device
    changed: list[str] = []
    with in_evaluation_mode(loaded.module):
        try:
            with one_line_for_full_devices():
                loaded.module.to(target)
            subject = Subject(
                loaded,
                target,
                batch_size,
                seed,
                installed.registry,
                calibration=report.get("calibration"),
                progress=as_progress(progress),
                items=bool(items),
                made_of=report["recipe"]["model"] if report else None,
                loader=_loader(loaded, target, report, installed.registry, changed),
            )
            results, shrunk = _in_batches_that_fit(evaluator, subject)
        finally:
            loaded.module.to(home)
    records = results.pop("items", None)
    warnings = [*results.pop("warnings", []), *shrunk, *dict.fromkeys(changed), *loaded.remarks]
    if items and records is None:
        warnings = [*warnings, f"evaluator {evaluator.name!r} keeps no record of its items, so there is none"]
    outcome = {
        "task": task,
        **results,
        "warnings": warnings,
        "recipe": recipe.model_dump(),
        "versions": provenance.versions(),
    }
    if folder is not None:
        failed = reports.record_evaluation(folder, outcome)
        outcome["warnings"] += [failed] if failed else []
    if output is not None:
        write_text(json.dumps(outcome, indent=2) + "\n", Path(output))
    if records is not None and isinstance(items, str | Path):
        write_text(_as_lines(records), Path(items))
    return {**outcome, "items": records} if records is not None and items is True else outcome


def _in_batches_that_fit(evaluator: Evaluator, subject: Subject) -> tuple[dict[str, Any], list[str]]:
    """Evaluate, in smaller batches where memory is full and nobody chose their size.

    Returns:
        The results, and a warning if the batches became smaller.

    Raises:
        DeviceFullError: Memory is full, and no smaller batches can be tried.
    """
    usual: int | None = None
    while True:
        try:
            with one_line_for_full_devices(), wide_products(subject.model.module, subject.device):
                results = evaluator.evaluate(subject)
            break
        except DeviceFullError:
            tried = subject.batch_size or (subject.sizes or [1])[-1]
            if tried == 1 or (subject.batch_size is not None and usual is None):
                raise
        # Here, since the error holds on to everything that filled the memory.
        free_memory(subject.device)
        usual = usual or tried
        subject = replace(subject, batch_size=tried // 2)
    said = f"batches of {usual} samples did not fit in memory, so {subject.batch_size} went through the model together"
    return results, [said] if usual else []


def _loader(
    loaded: LoadedModel, device: torch.device, report: Mapping[str, Any], registry: Registry, changed: list[str]
) -> Callable[[str], LoadedModel]:
    """Return what loads a model to compare another with, on the same device and in the same dtype.

    `changed` gets a warning if it is not the one that was pruned.
    """
    pruned_from = report.get("model", {})

    def load(reference: str) -> LoadedModel:
        if reference == pruned_from.get("reference") == pruned_from.get("class"):
            raise PruneForgeError(f"it was a {reference} in memory")
        dtype = str(next(loaded.module.parameters()).dtype).removeprefix("torch.")
        other = load_model(reference, dtype, None, registry)
        found, expected = _fingerprint(other, report), pruned_from.get("fingerprint")
        if found is not None and found != expected:
            changed.append(
                f"the dense model {reference!r} is not the one that was pruned: its fingerprint is {found}, and the "
                f"report's {expected}"
            )
        other.module.eval().to(device)
        return replace(other, reference=reference)  # as it was asked for: a demo's folder differs between machines

    return load


def _fingerprint(dense: LoadedModel, report: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of a dense model as a report has it, or `None` where there is nothing to compare.

    A run that streamed, which alone has an identity, hashed the whole checkpoint. A folder is read once more for that,
    from the system's cache as a rule; what was downloaded is not, as the Hub has hashes of its own. A run in memory
    hashed some values of each parameter, in the dtype that it computed in.
    """
    if "identity" not in report:
        return None
    if report["identity"]:
        folder = Path(dense.reference)
        whole = any((folder / name).is_file() for name in (SINGLE, INDEX))
        return _of_files(folder, _stamps(folder)) if whole else None
    dtype = str(next(dense.module.parameters()).dtype).removeprefix("torch.")
    return provenance.fingerprint(dense.module) if dtype == report["model"]["dtype"] else None


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, size and time of change of a checkpoint's files."""
    files = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors*"))]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


@functools.lru_cache(maxsize=8)  # a study compares many pruned models with one
def _of_files(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    return Checkpoint(folder).fingerprint()


def _as_lines(records: Mapping[str, Sequence[Any]]) -> str:
    """Return records as JSON Lines, an object for each item."""
    rows = zip(*records.values(), strict=True)
    return "".join(json.dumps(dict(zip(records, row, strict=True))) + "\n" for row in rows)


def _check_writable(files: Sequence[Path], force: bool) -> None:
    """Raise unless files can be written, and replace nothing but earlier results or what `force` allows.

    Raises:
        PruneForgeError: Naming the file.
    """
    for path in files:
        if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise PruneForgeError(
                f"cannot write {str(path)!r}: its folder does not exist or is read-only, or it is a folder itself"
            )
        if path.exists() and not path.is_file():
            raise PruneForgeError(f"{str(path)!r} is no file but a device or the like; name another one")
        if path.exists() and not force and not _is_result(path):
            raise PruneForgeError(
                f"{str(path)!r} is there already, and is no result of an evaluation; name another file, or pass `force`"
            )
    if len({path.resolve() for path in files}) < len(files):
        raise PruneForgeError(f"results and items cannot both be written to {str(files[0])!r}")


def _is_result(path: Path) -> bool:
    """Return whether a file holds the results of an earlier evaluation."""
    if path.stat().st_size > LARGEST_RESULT:
        return False
    try:
        found = read_json(path, "results")
    except PruneForgeError:  # among them what is no text
        return False
    return isinstance(found, dict) and {"task", "recipe", "versions"} <= found.keys()
