"""`pruneforge.prune`: from a model and a metric to a pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pruneforge.checkpoint.masks import load_masks
from pruneforge.data.calibration import Data
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.metric import Metric
from pruneforge.plugins import plugins
from pruneforge.progress import Progress
from pruneforge.runs import report as reports
from pruneforge.runs.job import make_job
from pruneforge.runs.loading import load_model, parse_device
from pruneforge.runs.result import PruneResult


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
    resume: bool = False,
    memory_budget: str | int | None = None,
    device_memory_budget: str | int | None = None,
    gradient_cache: str | Path | None = None,
    profile: bool = False,
    progress: bool | Progress = False,
    processor: Any = None,
) -> PruneResult:
    """Prune a model in one shot.

    With a folder or hub id and an `output`, weights stay on disk: each block is read, pruned, written to the output
    and let go, and the output keeps the checkpoint's files and dtypes. Everything that is not pruned is byte for
    byte what it was. Otherwise the whole model is held in memory.

    Args:
        model: A folder, a hub id, or a model in memory, which is pruned in place.
        metric: Name of a registered metric, or a `Metric`.
        sparsity: Share of weights to prune, in [0, 1); a half by default, or what the pattern says.
        pattern: `None` for unstructured, or "N:M" for N kept of every M consecutive inputs.
        calibration: Source name, path, or iterable of batches: int64 [samples, tokens], or mappings with
            `input_ids` and `attention_mask`. Not needed by a metric that looks at weights alone.
        samples: Sequences or images to draw from a source.
        seqlen: Tokens a sequence; by default the model's context, at most 2048.
        batch_size: Samples that go through a block together; by default as many as have 1024 tokens on the CPU
            and 4096 on CUDA, or fewer if a budget is small.
        options: Options of a metric given by name.
        source_options: Options of the calibration source.
        adapter_options: Options of the model's adapter.
        exclude: Layers to leave dense, as names with wildcards, such as "*.down_proj"; the report lists them.
        propagate: Whether calibration sees the earlier blocks "pruned" (as the published language-model
            code does) or "dense".
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: Dtype to load or cast the model to; "auto" keeps its own.
        seed: Seed of every random choice.
        output: Folder to write model, masks, report and recipe to; it must be absent or empty, or hold an
            unfinished run to resume.
        resume: Go on with an unfinished run in `output`, if there is one. It must be the same run: recipe, model,
            data and versions.
        memory_budget: What the run may take in host memory, as bytes or "3GB"; hidden states that do not fit wait
            on disk. By default most of what is free.
        device_memory_budget: The same for a CUDA device; what does not fit waits in host memory.
        gradient_cache: Folder in which gradient statistics are kept for later runs on the same model and data; by
            default `$PRUNEFORGE_CACHE`, or the user's cache folder.
        profile: Whether to look at the memory all the while. The report then says what each stage took of time and
            memory for each block, and the output holds a trace that https://ui.perfetto.dev opens.
        progress: `True` for bars on a terminal.
        processor: Tokenizer or image transform of a model in memory.

    Returns:
        The pruned model, its masks and the report.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit. What can be known beforehand is
            raised before anything is written or changed; weights and activations that are not finite are found
            on the way, when earlier blocks are already pruned.
    """
    return make_job(
        model,
        metric,
        calibration,
        options=options,
        output=output,
        resume=resume,
        memory_budget=memory_budget,
        device_memory_budget=device_memory_budget,
        gradient_cache=gradient_cache,
        profile=profile,
        progress=progress,
        processor=processor,
        sparsity=sparsity,
        pattern=pattern,
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        source_options=source_options,
        adapter_options=adapter_options,
        exclude=list(exclude),
        propagate=propagate,
        device=device,
        dtype=dtype,
        seed=seed,
    ).run()[0]


def prune_each(
    model: str | Path,
    metric: str | Metric,
    patterns: Sequence[float | str],
    calibration: Data | None = None,
    *,
    output: str | Path,
    propagate: Literal["pruned", "dense"] = "dense",
    **settings: Any,
) -> dict[str, PruneResult]:
    """Prune a model to several patterns in one pass over the calibration data.

    Forward passes, statistics and what a metric derives from them are shared; each pattern's output is the one that
    `prune` gives with `propagate="dense"`, byte for byte but for the times in the report.

    Args:
        model: A folder or hub id.
        metric: As for `prune`.
        patterns: Sparsities, such as 0.5, and "N:M".
        calibration: As for `prune`.
        output: Each pattern's folder stands below it, named "0.5" or "2of4".
        propagate: "dense"; metrics that see no activations need not say.
        settings: Every other argument of `prune`, by name.

    Returns:
        A result for each pattern, by the name of its folder.

    Raises:
        PruneForgeError: As `prune` does; besides, a pattern comes twice, there is none, or the model cannot be
            streamed.
    """
    for name in ("sparsity", "pattern"):
        if name in settings:
            raise PruneForgeError(f"prune_each takes its sparsities and patterns as `patterns`, not as {name}=")
    job = make_job(model, metric, calibration, patterns=patterns, output=output, propagate=propagate, **settings)
    names = [variant.output.name for variant in job.variants if variant.output is not None]
    return dict(zip(names, job.run(), strict=True))


def load(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> PruneResult:
    """Load what `prune` wrote to `folder`.

    Raises:
        PruneForgeError: The folder is not the output of a pruning run.
    """
    path = Path(folder)
    masks, report = load_masks(path), reports.load_report(path)
    if report is None:
        raise PruneForgeError(f"{str(folder)!r} holds no {reports.REPORT_FILE}; it is not the output of a pruning run")
    loaded = load_model(path, dtype, None, plugins().registry)
    loaded.module.to(parse_device(device))
    return PruneResult(report, loaded=loaded, masks=masks)
