"""One pruning run from what was asked to what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.checkpoint.folder import check_output, new_folder
from pruneforge.checkpoint.journal import JOURNAL_FILE
from pruneforge.checkpoint.masks import save_masks
from pruneforge.data.calibration import Calibration, Data, collect
from pruneforge.engine.budget import Budgets
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import cache_folder
from pruneforge.engine.hidden_states import Store
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.processes import Group, joined
from pruneforge.engine.residency import InMemory
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.interfaces.source import create_source
from pruneforge.memory import PeakMemory, one_line_for_full_devices
from pruneforge.numerics import exact_arithmetic
from pruneforge.plugins import Plugins, plugins
from pruneforge.profile import PROFILE_FILE, Profile
from pruneforge.progress import Progress, as_progress
from pruneforge.runs import provenance
from pruneforge.runs import report as reports
from pruneforge.runs.loading import in_evaluation_mode, load_model, parse_device, parse_dtype
from pruneforge.runs.plan import Variant, make_metric, make_pattern, make_variants, without
from pruneforge.runs.provenance import run_identity
from pruneforge.runs.recipe import PruneRecipe, save_recipe, validated
from pruneforge.runs.result import PruneResult
from pruneforge.runs.streaming import Output, prune_streamed


@dataclass(frozen=True)
class Job:
    """Everything that was asked for, checked as far as it can be without the model.

    Attributes:
        variants: What to prune to; recipes differ in sparsity and pattern alone.
        model: A folder, a hub id, or a model in memory.
        metric: The metric, with its options.
        calibration: Calibration data.
        processor: Tokenizer or image transform of a model in memory.
        device: Where to compute.
        budgets: What the run may take in memory.
        gradients: Where gradient statistics are kept for later runs, if that was said.
        resume: Whether to go on with an unfinished run.
        profile: Whether to look at the memory all the while, and leave a trace in the output.
        plugins: The plugins.
        progress: Where to show how far along the run is.
    """

    variants: tuple[Variant, ...]
    model: str | Path | nn.Module
    metric: Metric
    calibration: Data | None
    processor: Any
    device: torch.device
    budgets: Budgets
    gradients: Path | None
    resume: bool
    profile: bool
    plugins: Plugins
    progress: Progress

    @property
    def recipe(self) -> PruneRecipe:
        """The settings; sparsity and pattern are those of the first variant."""
        return self.variants[0].recipe

    def run(self) -> list[PruneResult]:
        """Prune, and return a result for each variant."""
        on_disk = self.variants[0].output is not None and not isinstance(self.model, nn.Module)
        if not on_disk:
            self._refuse_what_streams("that takes a folder or hub id and an output")
        for variant in self.variants:
            # The journal says what an unfinished run's folder holds, once it is locked.
            if variant.output is not None and not (
                on_disk and (self.resume or (variant.output / JOURNAL_FILE).is_file())
            ):
                check_output(variant.output)
        with joined(self.device) as group:
            progress = self.progress if group.first else Progress()
            peak = PeakMemory(self.device)
            loaded, data, runs = self.prepare(group, progress, on_disk)
            for run in runs:
                self.plugins.hook.pruneforge_run_started(run=run)
            with (
                exact_arithmetic(runs[0].seed, self.device),
                in_evaluation_mode(loaded.module),
                runs[0].profile.watching(),
                one_line_for_full_devices(),
            ):
                if loaded.checkpoint is None:
                    return [self._in_memory(loaded, data, runs[0], group, progress, peak)]
                return self._streamed(loaded, data, runs, group, progress, peak)

    def prepare(self, group: Group, progress: Progress, on_disk: bool) -> tuple[LoadedModel, Calibration, list[Run]]:
        """Return the model, the calibration data, and a run for each variant.

        Args:
            group: The processes that share the work.
            progress: Where to show how far along reading is.
            on_disk: Whether weights stay on disk, if they can.
        """
        recipe, registry = self.recipe, self.plugins.registry
        loaded = load_model(self.model, recipe.dtype, self.processor, registry, recipe.adapter_options, on_disk)
        blocks, excluded = without(loaded.adapter.blocks(loaded.module), recipe.exclude)
        data = Calibration([], {})
        if self.metric.requires and self.calibration is not None:
            data = collect(
                self.calibration,
                loaded,
                registry,
                samples=recipe.samples,
                seqlen=recipe.seqlen,
                batch_size=recipe.batch_size,
                tokens_a_batch=self.budgets.tokens_a_batch(blocks, self.device),
                seed=recipe.seed,
                options=recipe.source_options,
                progress=progress,
                processes=group.size,
            )
        profile = Profile(self.device, self.profile)
        warnings = [*([loaded.note] if loaded.note else []), *data.warnings]
        runs = [
            Run(self.metric, variant.pattern, recipe.propagate, blocks, recipe.seed, excluded, list(warnings), profile)
            for variant in self.variants
        ]
        return loaded, data, runs

    def _refuse_what_streams(self, why: str) -> None:
        """Raise if something was asked for that only a streamed run does."""
        asked = {
            "resume": self.resume,
            "memory budget": self.budgets != Budgets(),
            "gradient cache": self.gradients is not None,
            "more than one pattern": len(self.variants) > 1,
        }
        for what, is_asked in asked.items():
            if is_asked:
                raise PruneForgeError(f"{what} goes with a model that is streamed from its folder, and {why}")

    def _in_memory(
        self, loaded: LoadedModel, data: Calibration, run: Run, group: Group, progress: Progress, peak: PeakMemory
    ) -> PruneResult:
        self._refuse_what_streams(loaded.note or "this one is not")
        variant = self.variants[0]
        if variant.output is not None:
            check_output(variant.output)
        fingerprint = provenance.fingerprint(loaded.module)
        masks: dict[str, Tensor] = {}

        def block_pruned(run: Run, result: BlockResult) -> None:
            masks.update(result.masks)
            self.plugins.hook.pruneforge_block_pruned(run=run, result=result)

        with run.profile.stage("total"):
            residency = InMemory(loaded.module, run.blocks, self.device)
            host, on_device = self.budgets.for_activations(run.blocks, run.metric, loaded, data.batches, self.device)
            with closing(Store(self.device, on_device, host)) as store:
                chain = Chain(loaded.module, loaded.adapter, run.blocks, residency, store)
                prune_blocks([run], chain, data.batches, progress, block_pruned, group=group)
            run.activations = {name: home.peak for name, home in store.homes.items()}
        report = self._report(variant, loaded, data, run, fingerprint, peak, {})
        if variant.output is not None and group.first:
            with new_folder(variant.output) as folder:
                loaded.adapter.save(loaded.module, loaded.processor, folder)
                save_masks(masks, folder)
                self._describe(variant, run, report, folder)
        return PruneResult(report, loaded=loaded, masks=masks, profile=run.profile)

    def _streamed(
        self,
        loaded: LoadedModel,
        data: Calibration,
        runs: list[Run],
        group: Group,
        progress: Progress,
        peak: PeakMemory,
    ) -> list[PruneResult]:
        assert loaded.checkpoint is not None
        profile = runs[0].profile
        with profile.stage("total"), profile.stage("fingerprint"):
            fingerprint = group.gather(loaded.checkpoint.fingerprint() if group.first else "")[0]
        outputs: list[Output] = []
        for variant, run in zip(self.variants, runs, strict=True):
            assert variant.output is not None
            identity = run_identity(variant.recipe, fingerprint, data, group, self.device)
            outputs.append(Output(variant.output, loaded, run, variant.recipe, identity))
        reports_of: dict[Path, dict[str, Any]] = {}

        def conclude(output: Output) -> None:
            if group.first:
                variant = self.variants[outputs.index(output)]
                report = self._report(
                    variant, loaded, data, output.run, fingerprint, peak, output.identity, len(unfinished)
                )
                reports_of[output.folder] = report
                self._describe(variant, output.run, report, output.folder)

        unfinished = [output for output in outputs if not (self.resume and output.is_finished())]
        if unfinished:
            prune_streamed(
                unfinished,
                loaded,
                data,
                fingerprint,
                device=self.device,
                resume=self.resume,
                budgets=self.budgets,
                gradients=self.gradients or cache_folder(),
                group=group,
                progress=progress,
                block_pruned=lambda run, result: self.plugins.hook.pruneforge_block_pruned(run=run, result=result),
                conclude=conclude,
            )
        for output in outputs if group.first else ():
            if output not in unfinished:
                reports_of[output.folder] = reports.load_report(output.folder) or {}
        return [
            PruneResult(
                reports_of.get(output.folder, {}),
                output.folder,
                dtype=self.recipe.dtype,
                profile=profile if output in unfinished else None,
            )
            for output in outputs
        ]

    def _report(
        self,
        variant: Variant,
        loaded: LoadedModel,
        data: Calibration,
        run: Run,
        fingerprint: str,
        peak: PeakMemory,
        identity: dict[str, Any],
        at_once: int = 1,
    ) -> dict[str, Any]:
        report = reports.make_report(
            variant.recipe, loaded, fingerprint, data.description or None, run, peak.read(), identity
        )
        report["measured"]["patterns_at_once"] = at_once
        self.plugins.hook.pruneforge_run_finished(run=run, report=report)
        return report

    def _describe(self, variant: Variant, run: Run, report: dict[str, Any], folder: Path) -> None:
        """Write what stands beside the weights."""
        save_recipe(variant.recipe, folder)
        reports.save_report(report, folder)
        if self.profile:
            run.profile.save(folder / PROFILE_FILE)


def make_job(
    model: str | Path | nn.Module,
    metric: str | Metric,
    calibration: Data | None = None,
    *,
    patterns: Sequence[float | str] | None = None,
    options: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    memory_budget: str | int | None = None,
    device_memory_budget: str | int | None = None,
    gradient_cache: str | Path | None = None,
    profile: bool = False,
    progress: bool | Progress = False,
    processor: Any = None,
    **settings: Any,
) -> Job:
    """Return a job; its arguments are those of `pruneforge.prune`, or with `patterns` of `pruneforge.prune_each`.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit, as far as that shows without the model.
    """
    found = plugins()
    recipe = validated(
        PruneRecipe,
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        metric=metric if isinstance(metric, str) else metric.name,
        calibration=str(calibration) if isinstance(calibration, str | Path) else None,
        options=dict(options or {}) if isinstance(metric, str) else metric.options.model_dump(),
        plugins=[plugin.origin for plugin in found.loaded if plugin.from_file],
        **{name: value for name, value in settings.items() if value is not None},
    )
    chosen = make_metric(metric, options, found.registry)
    folder = Path(output) if output is not None else None
    if patterns is None:
        pattern = make_pattern(chosen, recipe.sparsity, recipe.pattern, recipe.propagate)
        variants: tuple[Variant, ...] = (Variant(recipe, pattern, folder),)
    else:
        variants = make_variants(recipe, chosen, patterns, folder)
    if chosen.requires and calibration is None:
        raise PruneForgeError(f"metric {chosen.name!r} needs calibration data; pass `calibration` SOURCE or PATH")
    if isinstance(calibration, str | Path):
        create_source(calibration, recipe.source_options, found.registry)  # before a large model is loaded
    device, _ = parse_device(recipe.device), parse_dtype(recipe.dtype)
    return Job(
        variants=variants,
        model=model,
        metric=chosen,
        calibration=calibration,
        processor=processor,
        device=device,
        budgets=Budgets.parse(memory_budget, device_memory_budget),
        gradients=Path(gradient_cache) if gradient_cache else None,
        resume=resume,
        profile=profile,
        plugins=found,
        progress=as_progress(progress),
    )
