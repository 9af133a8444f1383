"""`pruneforge.apply`: make a pruned model from masks that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from pruneforge.checkpoint.masks import file_of, load_mask, load_permutations, mask_shapes
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric, Pruned
from pruneforge.interfaces.patterns import NM, Pattern, Unstructured, parse_pattern
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.progress import Progress
from pruneforge.runs import report_file as reports
from pruneforge.runs.job import make_job
from pruneforge.runs.places import check_place
from pruneforge.runs.provenance import file_hash
from pruneforge.runs.result import PruneResult
from pruneforge.runs.session import Session


class GivenMasks(Metric):
    """Masks from a file, read layer by layer, in the place of a metric."""

    name = "given-masks"
    scope = None

    class Options(Metric.Options):
        """Which masks."""

        path: str = Field(description="file of the masks")
        sha256: str = Field(description="hash of that file")
        permutes: bool = Field(description="whether each mask comes with an order of its columns")

    options: Options

    @property
    def permutes(self) -> bool:  # type: ignore[override]
        """Whether each mask comes with an order of its columns."""
        return self.options.permutes

    def prune_layer(self, layer: Layer, stats: LayerStatistics, pattern: Pattern) -> Pruned:
        """Return the layer's mask."""
        file, device = Path(self.options.path), layer.parameter.device
        order = load_permutations(file, layer.name)[layer.name].to(device) if self.permutes else None
        return Pruned(load_mask(file, layer.name).to(device), permutation=order)


def apply(
    masks: str | Path,
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    any_model: bool = False,
    masks_only: bool = False,
    exclude: Sequence[str] = (),
    adapter_options: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    progress: bool | Progress = False,
    processor: Any = None,
) -> PruneResult:
    """Make a pruned model from published masks and the dense model, without calibration data.

    With a folder or hub id and an `output`, weights stay on disk, as in `prune`. For a method that leaves the remaining
    weights as they are the model's bytes equal those that `prune` wrote. The report beside the masks, if there is one,
    says whether that is so, which model was pruned, and which layers stay dense.

    Args:
        masks: The output of a pruning run, or its `pruneforge.masks`, with or without `pruneforge.json` beside it.
        model: The dense model: a folder, a hub id, or a model in memory, which is pruned in place.
        output: Folder to write model, masks and report to; as for `prune`.
        any_model: Whether to take a model that is another one than the report says, such as a fine-tuned one.
        masks_only: Whether to go on if the run that made the masks also updated weights, which masks alone do not
            give back.
        exclude: Further layers to leave dense, as names with wildcards: those without a mask, where no report says it.
        adapter_options: Options of the model's adapter; by default those of the run that made the masks.
        device: Where to compute.
        dtype: Dtype to compute in, as for `prune`.
        resume: Whether to go on with an unfinished run in `output`.
        progress: Whether to show progress.
        processor: Tokenizer or image transform of a model in memory.

    Returns:
        The pruned model. Its report has under `masks` where they come from, their hash, and the recipe that made them.

    Raises:
        PruneForgeError: The model is another one, or its layers are; weights were updated; or as `prune` does.
    """
    check_place(str(masks))
    file = file_of(Path(masks))
    shapes = mask_shapes(Path(masks))
    report = reports.load_report(file.parent)
    recipe = (report or {}).get("recipe", {})
    updated = (report or {}).get("updated", [])
    if updated and not masks_only:
        raise PruneForgeError(
            f"the run that made the masks in {str(masks)!r} also changed weights that remain ({len(updated)} tensors, "
            f"such as {updated[0]!r}), which masks alone do not give back; take its published weights, or the masks "
            "alone with `masks_only`"
        )
    counts = {name: _pruned(file, name) for name in shapes}
    permutes = bool(load_permutations(file, next(iter(shapes), None)))
    metric = GivenMasks(path=str(file), sha256=file_hash(file), permutes=permutes)
    made_by = (report or {}).get("masks", {}).get("recipe", recipe)  # masks may have been applied before
    origin = {"path": str(masks), "sha256": metric.options.sha256, "recipe": made_by or None}
    pattern, steps = _pattern(report), counts
    if pattern is not None:
        steps = _steps(file, shapes, counts, pattern)
        pattern = pattern if steps else None  # masks of rows that a routed layer left dense, say
    if permutes and pattern is None:
        why = f"no {reports.REPORT_FILE} beside them says which pattern; put it there"
        if report is not None:
            why = f"they do not fit that of {reports.REPORT_FILE}, {report['pattern']['pattern']}"
        raise PruneForgeError(f"the masks in {str(masks)!r} fit their pattern with columns permuted, and {why}")
    total = sum(rows * columns for rows, columns in shapes.values())
    whole = Unstructured(0.0, "layer").at(sum(counts.values()), (1, total))
    job = make_job(
        model,
        metric,
        output=output,
        sparsity=None if pattern else whole.sparsity,
        pattern=str(pattern) if pattern else None,
        exclude=[*recipe.get("exclude", ()), *exclude],
        adapter_options=recipe.get("adapter_options") if adapter_options is None else adapter_options,
        device=device,
        dtype=dtype,
        resume=resume,
        progress=progress,
        processor=processor,
    )
    (run,) = job.runs
    run.origin = origin
    run.allocation = steps or counts
    run.warnings += _warnings(report)
    return job.run(partial(_check, shapes=shapes, report=report, any_model=any_model))[0]


def _check(session: Session, shapes: Mapping[str, tuple[int, int]], report: Any, any_model: bool) -> None:
    """Raise unless masks fit a model's layers, and it is the one that they were made for, as far as that is known."""
    (run,) = session.runs
    layers = {layer.name: layer.shape for block in run.blocks for layer in block.layers}
    missing, unknown = [name for name in layers if name not in shapes], [name for name in shapes if name not in layers]
    if unknown:
        raise PruneForgeError(
            f"{len(unknown)} of {len(shapes)} masks are for layers that the model does not have or that are excluded, "
            f"such as {unknown[0]!r}; take the model that the masks were made for"
        )
    for name, shape in layers.items():
        if name in shapes and shapes[name] != shape:
            raise PruneForgeError(
                f"layer {name!r} is {shape}, and its mask {shapes[name]}; take the model that the masks were made for"
            )
    if missing:
        raise PruneForgeError(
            f"{len(missing)} layers have no mask, such as {missing[0]!r}; leave them dense with `exclude`"
        )
    if report is None or any_model:
        return
    known, loaded = report["model"], session.loaded
    # A streamed run hashes the checkpoint, one in memory the parameters in the dtype that it computes in.
    dtype = str(next(loaded.module.parameters()).dtype).removeprefix("torch.")
    streamed = loaded.checkpoint is not None
    if streamed != bool(report["identity"]) or (not streamed and dtype != known["dtype"]):
        run.warnings.append(
            "the model's fingerprint is not checked: the run that made the masks took it of a model "
            + ("in memory" if streamed else f"on disk or in {known['dtype']}")
        )
    elif session.fingerprint != known["fingerprint"]:
        raise PruneForgeError(
            f"the model is not the one that the masks were made for, {known['reference']!r}: its fingerprint is "
            f"{session.fingerprint}, and the report's {known['fingerprint']}; take that one, or any with `any_model`"
        )


def _warnings(report: Mapping[str, Any] | None) -> list[str]:
    """Return what is not as the run that made the masks left it, or not known."""
    if report is None:
        return [
            f"no {reports.REPORT_FILE} is beside the masks, so it is not checked whether the model is the one that "
            "they were made for, and whether weights were updated as well"
        ]
    if "updated" not in report:
        return ["the report beside the masks is of a version that does not say whether weights were updated as well"]
    if report["updated"]:
        return [
            f"the run that made the masks also changed {len(report['updated'])} tensors, which here are as in the "
            "dense model"
        ]
    return []


def _pattern(report: Mapping[str, Any] | None) -> NM | None:
    """Return the N:M pattern that a report names."""
    if report is None or ":" not in report["pattern"]["pattern"]:
        return None
    pattern = parse_pattern(None, report["pattern"]["pattern"], "layer")
    assert isinstance(pattern, NM)
    return pattern


def _steps(file: Path, shapes: Mapping[str, Any], counts: Mapping[str, int], pattern: NM) -> dict[str, int]:
    """Return how many of every group each mask prunes, which an allocator may have chosen; empty unless all fit."""
    steps = {}
    for name, shape in shapes.items():
        order = load_permutations(file, name).get(name)
        steps[name], rest = divmod(counts[name], pattern.steps(shape)[1])
        at = pattern.at(steps[name], shape)
        if shape[1] % pattern.m or rest or not Pruned(load_mask(file, name), permutation=order).fits(at):
            return {}
    return steps


def _pruned(file: Path, layer: str) -> int:
    mask = load_mask(file, layer)
    return mask.numel() - int(mask.count_nonzero())
