"""`pruneforge.prune`, `prune_each` and `load`: make pruned models, and load them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pruneforge.checkpoint.masks import load_masks, load_permutations
from pruneforge.data.calibration import Data
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.allocator import Allocator
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.recovery import Recovery
from pruneforge.interfaces.refiner import Refiner
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress
from pruneforge.runs import report_file as reports
from pruneforge.runs.documented import documented
from pruneforge.runs.job import make_job, refuse_single_pattern
from pruneforge.runs.loading import load_model, parse_device
from pruneforge.runs.parts import Metrics
from pruneforge.runs.resources import Resources
from pruneforge.runs.result import PruneResult


@documented(PruneRecipe, Resources)
def prune(  # noqa: D417 -- the settings are described where they are declared
    model: str | Path | nn.Module,
    metric: str | Metric,
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: Data | None = None,
    *,
    streams: Mapping[str, Data] | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    batch_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    propagate: Literal["pruned", "dense"] = "pruned",
    allocator: str | Allocator | None = None,
    allocator_options: Mapping[str, Any] | None = None,
    refine: str | Refiner | Sequence[str | Refiner] = (),
    refine_options: Mapping[str, Any] | None = None,
    recover: str | Recovery | None = None,
    recover_options: Mapping[str, Any] | None = None,
    objective: str | Objective | None = None,
    objective_options: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    memory_budget: str | int | None = None,
    device_memory_budget: str | int | None = None,
    gradient_cache: str | Path | None = None,
    profile: bool = False,
    details: bool = False,
    observe: str | Sequence[str] = (),
    observe_options: Mapping[str, Any] | None = None,
    progress: bool | Progress = False,
    processor: Any = None,
) -> PruneResult:
    """Prune a model in one shot.

    With a folder or hub id and an `output`, weights stay on disk: each block is read, pruned, written to the output
    and released. The output keeps the checkpoint's files and dtypes, and all tensors that are not pruned, byte for
    byte. Otherwise the whole model is held in memory.

    Args:
        model: A folder, a hub id, or a model in memory, which is pruned in place.
        metric: Name of a registered metric, or a `Metric`.
        calibration: Source name, path, or iterable of batches: int64 [samples, tokens], or mappings with
            `input_ids` and `attention_mask`. Not needed by a metric that looks at weights alone.
        output: Folder to write model, masks, report and recipe to; it must be absent or empty, or hold an
            unfinished run to resume.
        allocator: Name of an allocator, or an `Allocator`, which gives each layer its sparsity; without one all have
            the same.
        refine: Names of refiners, or `Refiner` objects, which change each mask after the metric, in this order.
        recover: Name of a recovery, or a `Recovery`, which changes the remaining weights of each block once it is
            pruned, or of the whole model in the end; that is then held in memory whole, in one process.
        objective: Name of an objective, or an `Objective`, the loss whose gradients metrics use; by default the one
            that the model was trained for.
        streams: Further calibration data by name, each as `calibration`, for methods that require `On(NAME, ...)`.
        processor: Tokenizer or image transform of a model in memory.
        {settings}

    Returns:
        The pruned model, its masks and the report.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit. What can be known beforehand is
            raised before anything is written or changed; weights and activations that are not finite are found
            on the way, when earlier blocks are already pruned.
    """
    arguments = locals()
    return make_job(**arguments).run()[0]


def prune_each(
    model: str | Path,
    metric: Metrics,
    patterns: Sequence[float | str],
    calibration: Data | None = None,
    *,
    output: str | Path,
    propagate: Literal["pruned", "dense"] = "dense",
    **settings: Any,
) -> dict[str, PruneResult]:
    """Prune a model by several metrics, to several patterns, in one pass over the calibration data.

    The runs share forward passes, gradients, statistics and what a metric derives from them. Each output equals that
    of `prune` with `propagate="dense"`, byte for byte except for what the report measured.

    Args:
        model: A folder or hub id.
        metric: As for `prune`, or several: in a list, or by labels of your own, such as
            `{"weak": Mine(alpha=1), "other": "NAME"}`. `options` then holds each one's options by its label.
        patterns: Sparsities, such as 0.5, and "N:M".
        calibration: As for `prune`.
        output: Folder for the runs' folders, which are named "0.5" or "2of4", and "other-0.5" if there are several
            metrics.
        propagate: "dense", or "pruned" for a metric that uses no activations, where both are the same.
        settings: Every other argument of `prune`, by name.

    Returns:
        A result for each run, by the name of its folder.

    Raises:
        PruneForgeError: As `prune` does; also if a metric or pattern is repeated, there is none, or the model
            cannot be streamed.
    """
    refuse_single_pattern(settings)
    job = make_job(model, metric, calibration, patterns=patterns, output=output, propagate=propagate, **settings)
    names = [run.folder.name for run in job.runs if run.folder is not None]
    return dict(zip(names, job.run(), strict=True))


def load(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> PruneResult:
    """Load what `prune` wrote to `folder`.

    Raises:
        PruneForgeError: The folder is not the output of a pruning run.
    """
    path = Path(folder)
    masks, permutations, report = load_masks(path), load_permutations(path), reports.load_report(path)
    if report is None:
        raise PruneForgeError(f"{str(folder)!r} holds no {reports.REPORT_FILE}; it is not the output of a pruning run")
    loaded = load_model(path, dtype, None, loaded_plugins().registry)
    loaded.module.to(parse_device(device))
    return PruneResult(report, loaded=loaded, masks=masks, permutations=permutations)
