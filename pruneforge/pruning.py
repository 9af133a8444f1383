"""`pruneforge.prune`: from a model and a metric to a pruned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pruneforge import report as reports
from pruneforge.adapter import Block
from pruneforge.calibration import Calibration, Data, collect, create_source
from pruneforge.checkpoint.masks import load_masks, save_masks
from pruneforge.checkpoint.output import check_output, new_folder
from pruneforge.engine.chain import Chain
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.residency import InMemory
from pruneforge.engine.run import Run
from pruneforge.errors import PruneForgeError
from pruneforge.layer import Layer
from pruneforge.memory import PeakMemory
from pruneforge.metric import Metric
from pruneforge.model import LoadedModel, in_evaluation_mode, load_model, parse_device, parse_dtype
from pruneforge.patterns import NM, Pattern, parse_pattern
from pruneforge.plugins import Plugins, plugins
from pruneforge.progress import BarProgress, Progress
from pruneforge.recipe import PruneRecipe, save_recipe
from pruneforge.registry import Registry
from pruneforge.statistics import InputStatistic


@dataclass(frozen=True)
class PruneResult:
    """A pruned model.

    Attributes:
        model: The model, its pruned weights zero.
        masks: Boolean [out, in] by full layer name, `True` keeps.
        report: What `pruneforge.json` holds.
        loaded: The model with its adapter and processor.
    """

    model: nn.Module = field(repr=False)
    masks: dict[str, Tensor] = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    loaded: LoadedModel = field(repr=False)


def prune(
    model: str | Path | nn.Module,
    metric: str | Metric,
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: Data | None = None,
    *,
    samples: int = 128,
    seqlen: int | None = None,
    batch_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    propagate: Literal["pruned", "dense"] = "pruned",
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool | Progress = False,
    processor: Any = None,
) -> PruneResult:
    """Prune a model in one shot.

    Args:
        model: A folder, a hub id, or a model in memory, which is pruned in place.
        metric: Name of a registered metric, or a `Metric`.
        sparsity: Share of weights to prune, in [0, 1); a half by default, or what the pattern says.
        pattern: `None` for unstructured, or "N:M" for N kept of every M consecutive inputs.
        calibration: Source name, path, or iterable of batches: int64 [samples, tokens], or mappings with
            `input_ids` and `attention_mask`. Not needed by a metric that looks at weights alone.
        samples: Sequences or images to draw from a source.
        seqlen: Tokens a sequence; by default the model's context, at most 2048.
        batch_size: Samples that go through a block together; by default 4096 tokens' worth.
        options: Options of a metric given by name.
        source_options: Options of the calibration source.
        adapter_options: Options of the model's adapter.
        exclude: Layers to leave dense, as names with wildcards, such as "*.down_proj"; the report lists them.
        propagate: Whether calibration sees the earlier blocks "pruned" (as the published language-model
            code does) or "dense".
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: Dtype to load or cast the model to; "auto" keeps its own.
        seed: Seed of every random choice.
        output: Folder to write model, masks, report and recipe to; it must be absent or empty.
        progress: `True` for bars on a terminal.
        processor: Tokenizer or image transform of a model in memory.

    Returns:
        The pruned model, its masks and the report.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit; nothing has been written. What
            can be known beforehand is raised before a model in memory is changed; weights and activations that
            are not finite are found on the way, when earlier blocks are already pruned.
    """
    found = plugins()
    bars = (BarProgress() if progress else Progress()) if isinstance(progress, bool) else progress
    recipe = _recipe(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        metric=metric if isinstance(metric, str) else metric.name,
        sparsity=sparsity,
        pattern=pattern,
        calibration=str(calibration) if isinstance(calibration, str | Path) else None,
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        options=dict(options or {}) if isinstance(metric, str) else metric.options.model_dump(),
        source_options=dict(source_options or {}),
        adapter_options=dict(adapter_options or {}),
        exclude=list(exclude),
        propagate=propagate,
        device=device,
        dtype=dtype,
        seed=seed,
        plugins=[plugin.origin for plugin in found.loaded if plugin.from_file],
    )
    chosen = _metric(metric, options, found.registry)
    asked = _pattern(chosen, sparsity, pattern, propagate)
    if chosen.requires and calibration is None:
        raise PruneForgeError(f"metric {chosen.name!r} needs calibration data; pass --calibration SOURCE or PATH")
    if isinstance(calibration, str | Path):
        create_source(calibration, source_options or {}, found.registry)  # before a large model is loaded
    target, _ = parse_device(device), parse_dtype(dtype)
    if output is not None:
        check_output(Path(output))
    peak = PeakMemory(target)
    loaded = load_model(model, dtype, processor, found.registry, adapter_options)
    data = Calibration([], {})
    if chosen.requires and calibration is not None:
        data = collect(
            calibration,
            loaded,
            found.registry,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            seed=seed,
            options=source_options or {},
            progress=bars,
        )
    fingerprint = reports.fingerprint(loaded.module)
    blocks, excluded = _without(loaded.adapter.blocks(loaded.module), exclude)
    run = Run(chosen, asked, propagate, blocks, seed, excluded)
    run.warnings += data.warnings
    with run.timed("total"), _exact_arithmetic(seed), in_evaluation_mode(loaded.module):
        _prune_in_memory(run, loaded, data, target, bars, found)
    report = reports.make_report(recipe, loaded, fingerprint, data.description or None, run, peak.read())
    found.hook.pruneforge_run_finished(run=run, report=report)
    if output is not None:
        _write(Path(output), loaded, run, recipe, report)
    return PruneResult(loaded.module, run.masks, report, loaded)


def load(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> PruneResult:
    """Load what `prune` wrote to `folder`.

    Raises:
        PruneForgeError: The folder is not the output of a pruning run.
    """
    path = Path(folder)
    masks, report = load_masks(path), reports.load_report(path)
    if report is None:
        raise PruneForgeError(f"{str(folder)!r} holds no {reports.FILE}; it is not the output of a pruning run")
    loaded = load_model(path, dtype, None, plugins().registry)
    loaded.module.to(parse_device(device))
    return PruneResult(loaded.module, masks, report, loaded)


def _recipe(**values: Any) -> PruneRecipe:
    try:
        return PruneRecipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise PruneForgeError(f"{first['loc'][0]}={first['input']!r}: {first['msg'].lower()}") from None


def _metric(metric: str | Metric, options: Mapping[str, Any] | None, registry: Registry) -> Metric:
    if isinstance(metric, str):
        return registry.create("metric", metric, options)
    if options:
        raise PruneForgeError("options go with a metric's name; give a Metric its options when you make it")
    return metric


def _pattern(metric: Metric, sparsity: float | None, pattern: str | None, propagate: str) -> Pattern:
    scope = metric.comparison_group()
    asked = parse_pattern(sparsity, pattern, scope or "layer")
    chosen = getattr(metric.options, "scope", None)
    if isinstance(asked, NM) and chosen is not None:
        raise PruneForgeError(f"scope={chosen} does not go with pattern {asked}, which compares within groups")
    calibrated = any(issubclass(kind, InputStatistic) for kind in metric.requires)
    if getattr(asked, "scope", None) == "model" and propagate == "pruned" and calibrated:
        raise PruneForgeError(
            "scope=model compares scores of all blocks, so none can be pruned before the last is calibrated; "
            "add --propagate dense"
        )
    return asked


def _without(blocks: list[Block], exclude: Sequence[str]) -> tuple[list[Block], list[Layer]]:
    """Return the blocks without the layers that `exclude` names, and those layers."""
    layers = [layer for block in blocks for layer in block.layers]
    for glob in exclude:
        if not any(fnmatchcase(layer.name, glob) for layer in layers):
            raise PruneForgeError(f"exclude={glob!r} fits no layer; they are called like {layers[0].name!r}")
    out = {layer.name for layer in layers if any(fnmatchcase(layer.name, glob) for glob in exclude)}
    if len(out) == len(layers):
        raise PruneForgeError(f"exclude={', '.join(exclude)} leaves no layer to prune")
    kept = [replace(block, layers=tuple(la for la in block.layers if la.name not in out)) for block in blocks]
    return kept, [layer for layer in layers if layer.name in out]


@contextmanager
def _exact_arithmetic(seed: int) -> Iterator[None]:
    """Full float32 products, and random numbers of the run's own that leave the caller's alone."""
    precision = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = convolution


def _prune_in_memory(
    run: Run, loaded: LoadedModel, data: Calibration, device: torch.device, progress: Progress, found: Plugins
) -> None:
    residency = InMemory(loaded.module, run.blocks, device)
    chain = Chain(loaded.module, loaded.adapter, run.blocks, residency)
    found.hook.pruneforge_run_started(run=run)
    prune_blocks(
        run,
        chain,
        data.batches,
        progress,
        lambda result: found.hook.pruneforge_block_pruned(run=run, result=result),
    )


def _write(output: Path, loaded: LoadedModel, run: Run, recipe: PruneRecipe, report: dict[str, Any]) -> None:
    with new_folder(output) as folder:
        loaded.adapter.save(loaded.module, loaded.processor, folder)
        save_masks(run.masks, folder)
        save_recipe(recipe, folder)
        reports.save_report(report, folder)
