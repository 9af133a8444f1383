"""One pruning run from what was asked to what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge import report as reports
from pruneforge.budget import Budgets
from pruneforge.calibration import Calibration, Data, collect, create_source
from pruneforge.checkpoint.journal import FILE as JOURNAL
from pruneforge.checkpoint.masks import save_masks
from pruneforge.checkpoint.output import check_output, new_folder
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import cache_folder
from pruneforge.engine.group import Group, joined
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.residency import InMemory
from pruneforge.engine.run import BlockResult, Run
from pruneforge.errors import PruneForgeError
from pruneforge.memory import PeakMemory
from pruneforge.metric import Metric
from pruneforge.model import LoadedModel, in_evaluation_mode, load_model, parse_device, parse_dtype
from pruneforge.patterns import Pattern
from pruneforge.plan import make_metric, make_pattern, make_recipe, without
from pruneforge.plugins import Plugins, plugins
from pruneforge.progress import BarProgress, Progress
from pruneforge.recipe import PruneRecipe, save_recipe
from pruneforge.result import PruneResult
from pruneforge.streaming import prune_streamed


@dataclass(frozen=True)
class Job:
    """Everything that was asked of a run, checked as far as it can be without the model.

    Attributes:
        recipe: The settings.
        model: A folder, a hub id, or a model in memory.
        metric: The metric, with its options.
        pattern: The pattern, with its scope.
        calibration: Calibration data.
        processor: Tokenizer or image transform of a model in memory.
        device: Where to compute.
        budgets: What the run may take in memory.
        gradients: Where gradient statistics are kept for later runs.
        output: The output folder.
        resume: Whether to go on with an unfinished run.
        plugins: The plugins.
        progress: Where to show how far along the run is.
    """

    recipe: PruneRecipe
    model: str | Path | nn.Module
    metric: Metric
    pattern: Pattern
    calibration: Data | None
    processor: Any
    device: torch.device
    budgets: Budgets
    gradients: Path
    output: Path | None
    resume: bool
    plugins: Plugins
    progress: Progress

    def run(self) -> PruneResult:
        """Prune."""
        on_disk = self.output is not None and not isinstance(self.model, nn.Module)
        if self.output is not None and not (on_disk and self.resume):
            self._check_new(self.output)
        with joined(self.device) as group:
            progress = self.progress if group.first else Progress()
            peak = PeakMemory(self.device)
            loaded, data, run = self.prepare(group, progress, on_disk)
            self.plugins.hook.pruneforge_run_started(run=run)
            with exact_arithmetic(run.seed), in_evaluation_mode(loaded.module):
                if loaded.checkpoint is None:
                    return self._in_memory(loaded, data, run, group, progress, peak)
                return self._streamed(loaded, data, run, group, progress, peak)

    def prepare(self, group: Group, progress: Progress, on_disk: bool) -> tuple[LoadedModel, Calibration, Run]:
        """Return the model, the calibration data, and the run that is to be made.

        Args:
            group: The processes that share the run.
            progress: Where to show how far along reading is.
            on_disk: Whether weights stay on disk, if they can.
        """
        recipe, registry = self.recipe, self.plugins.registry
        loaded = load_model(self.model, recipe.dtype, self.processor, registry, recipe.adapter_options, on_disk)
        data = Calibration([], {})
        if self.metric.requires and self.calibration is not None:
            data = collect(
                self.calibration,
                loaded,
                registry,
                samples=recipe.samples,
                seqlen=recipe.seqlen,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                options=recipe.source_options,
                progress=progress,
                processes=group.size,
            )
        blocks, excluded = without(loaded.adapter.blocks(loaded.module), recipe.exclude)
        run = Run(self.metric, self.pattern, recipe.propagate, blocks, recipe.seed, excluded)
        run.warnings += [*([loaded.note] if loaded.note else []), *data.warnings]
        return loaded, data, run

    def _check_new(self, output: Path) -> None:
        if not isinstance(self.model, nn.Module) and (output / JOURNAL).is_file():
            return  # the journal says what the folder holds, once it is locked
        check_output(output)

    def _in_memory(
        self, loaded: LoadedModel, data: Calibration, run: Run, group: Group, progress: Progress, peak: PeakMemory
    ) -> PruneResult:
        if self.output is not None:
            if self.resume or self.budgets != Budgets():
                why = loaded.note or "it was given from Python"
                raise PruneForgeError(f"the model cannot be streamed, so there is no resume and no budget: {why}")
            check_output(self.output)
        fingerprint = reports.fingerprint(loaded.module)
        masks: dict[str, Tensor] = {}

        def block_pruned(result: BlockResult) -> None:
            masks.update(result.masks)
            self.plugins.hook.pruneforge_block_pruned(run=run, result=result)

        with run.timed("total"):
            residency = InMemory(loaded.module, run.blocks, self.device)
            chain = Chain(loaded.module, loaded.adapter, run.blocks, residency)
            prune_blocks(run, chain, data.batches, progress, block_pruned, group=group)
        report = self._report(loaded, data, run, fingerprint, peak, {})
        if self.output is not None and group.first:
            with new_folder(self.output) as folder:
                loaded.adapter.save(loaded.module, loaded.processor, folder)
                save_masks(masks, folder)
                save_recipe(self.recipe, folder)
                reports.save_report(report, folder)
        return PruneResult(report, loaded=loaded, masks=masks)

    def _streamed(
        self, loaded: LoadedModel, data: Calibration, run: Run, group: Group, progress: Progress, peak: PeakMemory
    ) -> PruneResult:
        assert self.output is not None
        report: dict[str, Any] = {}

        def conclude(fingerprint: str, identity: dict[str, Any]) -> None:
            if self.output is not None and group.first:
                report.update(self._report(loaded, data, run, fingerprint, peak, identity))
                save_recipe(self.recipe, self.output)
                reports.save_report(report, self.output)

        pruned = prune_streamed(
            run,
            loaded,
            data,
            self.recipe,
            self.output,
            device=self.device,
            resume=self.resume,
            budgets=self.budgets,
            gradients=self.gradients,
            group=group,
            progress=progress,
            block_pruned=lambda result: self.plugins.hook.pruneforge_block_pruned(run=run, result=result),
            conclude=conclude,
        )
        if not pruned and group.first:
            report.update(reports.load_report(self.output) or {})
        return PruneResult(report, self.output, dtype=self.recipe.dtype)

    def _report(
        self,
        loaded: LoadedModel,
        data: Calibration,
        run: Run,
        fingerprint: str,
        peak: PeakMemory,
        identity: dict[str, Any],
    ) -> dict[str, Any]:
        report = reports.make_report(
            self.recipe, loaded, fingerprint, data.description or None, run, peak.read(), identity
        )
        self.plugins.hook.pruneforge_run_finished(run=run, report=report)
        return report


def make_job(
    model: str | Path | nn.Module,
    metric: str | Metric,
    calibration: Data | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    memory_budget: str | int | None = None,
    device_memory_budget: str | int | None = None,
    gradient_cache: str | Path | None = None,
    progress: bool | Progress = False,
    processor: Any = None,
    **settings: Any,
) -> Job:
    """Return a job; its arguments are those of `pruneforge.prune`.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit, as far as that shows without the model.
    """
    found = plugins()
    recipe = make_recipe(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        metric=metric if isinstance(metric, str) else metric.name,
        calibration=str(calibration) if isinstance(calibration, str | Path) else None,
        options=dict(options or {}) if isinstance(metric, str) else metric.options.model_dump(),
        plugins=[plugin.origin for plugin in found.loaded if plugin.from_file],
        **settings,
    )
    chosen = make_metric(metric, options, found.registry)
    pattern = make_pattern(chosen, recipe.sparsity, recipe.pattern, recipe.propagate)
    if chosen.requires and calibration is None:
        raise PruneForgeError(f"metric {chosen.name!r} needs calibration data; pass --calibration SOURCE or PATH")
    if isinstance(calibration, str | Path):
        create_source(calibration, recipe.source_options, found.registry)  # before a large model is loaded
    device, _ = parse_device(recipe.device), parse_dtype(recipe.dtype)
    return Job(
        recipe=recipe,
        model=model,
        metric=chosen,
        pattern=pattern,
        calibration=calibration,
        processor=processor,
        device=device,
        budgets=Budgets.parse(memory_budget, device_memory_budget),
        gradients=Path(gradient_cache) if gradient_cache else cache_folder(),
        output=Path(output) if output is not None else None,
        resume=resume,
        plugins=found,
        progress=(BarProgress() if progress else Progress()) if isinstance(progress, bool) else progress,
    )


@contextmanager
def exact_arithmetic(seed: int) -> Iterator[None]:
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
