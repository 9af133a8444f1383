"""From the arguments of `pruneforge.prune` to runs, and from runs to results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneforge.checkpoint.folder import check_output
from pruneforge.checkpoint.journal import JOURNAL_FILE
from pruneforge.data.calibration import Calibration, Data, RawBatches, collect
from pruneforge.engine.budget import Budgets
from pruneforge.engine.processes import Group, joined, process_count
from pruneforge.errors import DeviceFullError, PruneForgeError, unknown_name
from pruneforge.interfaces.allocator import searches
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.recovery import recovers_models
from pruneforge.interfaces.run import Run, needed_to_allocate
from pruneforge.interfaces.source import Source, create_source
from pruneforge.memory import PeakMemory, free_memory, one_line_for_full_devices
from pruneforge.numerics import exact_arithmetic
from pruneforge.plugins import Plugins, loaded_plugins
from pruneforge.profile import Profile
from pruneforge.progress import Progress, as_progress
from pruneforge.runs.in_memory import prune_in_memory
from pruneforge.runs.loading import in_evaluation_mode, load_model, parse_device, parse_dtype
from pruneforge.runs.observers import make_observers
from pruneforge.runs.parts import Metrics, make_methods
from pruneforge.runs.plan import make_runs, split_excluded
from pruneforge.runs.provenance import plugin_sources
from pruneforge.runs.recipe_file import validated
from pruneforge.runs.recovering import check_processes
from pruneforge.runs.resources import Resources
from pruneforge.runs.result import PruneResult
from pruneforge.runs.search import search_allocations
from pruneforge.runs.session import Session
from pruneforge.runs.streaming import prune_streamed
from pruneforge.wide_products import wide_products


@dataclass(frozen=True)
class Job:
    """Everything that was asked for, checked as far as it can be without the model.

    Attributes:
        model: A folder, a hub id, or a model in memory.
        runs: What to make of it.
        calibration: Calibration data.
        streams: Further calibration data, by name.
        processor: Tokenizer or image transform of a model in memory.
        device: Where to compute.
        resources: What the runs may use.
        plugins: The plugins.
    """

    model: str | Path | nn.Module
    runs: list[Run]
    calibration: Source | RawBatches | None
    streams: dict[str, Source | RawBatches]
    processor: Any
    device: torch.device
    resources: Resources
    plugins: Plugins

    def run(self, begin: Callable[[Session], object] | None = None) -> list[PruneResult]:
        """Prune, and return a result for each run.

        Where memory is full and nobody chose a batch size, smaller ones are tried; that is warned of, and the recipe
        of the result has the one that fitted.

        Args:
            begin: Called once the model is known, in every process, before anything is changed or written.
        """
        sizes: list[int] = []
        job, before = self, [list(run.warnings) for run in self.runs]
        while True:
            try:
                return job._attempt(begin, sizes)
            except DeviceFullError:
                if not job._may_shrink(sizes):
                    raise
            # Here, since the error holds on to everything that filled the memory.
            free_memory(self.device)
            smaller = sizes[-1] // 2
            job = replace(job, runs=[run.anew(smaller) for run in self.runs])
            for run, warnings in zip(job.runs, before, strict=True):
                run.warnings += [
                    *warnings,
                    f"batches of {sizes[0]} samples did not fit in memory, so {smaller} went through a block together; "
                    f"pass `batch_size` {smaller} to resume or repeat the run",
                ]

    def _may_shrink(self, sizes: Sequence[int]) -> bool:
        """Return whether the job can begin again with smaller batches.

        Args:
            sizes: Samples of the batches that were tried.
        """
        chosen = len(sizes) <= 1 and self.runs[0].recipe.batch_size is not None
        begun = any(run.folder is not None and (run.folder / JOURNAL_FILE).is_file() for run in self.runs)
        # A model in memory may have changed already, and several processes would have to agree.
        alone = not isinstance(self.model, nn.Module) and process_count() == 1
        return bool(sizes) and sizes[-1] > 1 and not chosen and not begun and alone

    @one_line_for_full_devices()
    def _attempt(self, begin: Callable[[Session], object] | None, sizes: list[int]) -> list[PruneResult]:
        """Prune as `run` says, in batches whose size is added to `sizes`."""
        streamed = self.runs[0].folder is not None and not isinstance(self.model, nn.Module)
        if not streamed:
            self.refuse_what_streams("that takes a folder or hub id and an output")
        for run in self.runs:
            # What an unfinished run's folder holds is checked later, by its journal, once that is locked.
            unfinished = run.folder is not None and (self.resources.resume or (run.folder / JOURNAL_FILE).is_file())
            if run.folder is not None and not (streamed and unfinished):
                check_output(run.folder)
        with joined(self.device) as group:
            self._refuse_in_company(group)
            session = self.open(group, streamed)
            if session.data.batches and isinstance(self.calibration, Source):
                sizes.append(max(batch.size for batch in session.data.batches))
            for run in self.runs:
                session.hook.pruneforge_run_started(run=run)
            with (
                exact_arithmetic(self.runs[0].seed, self.device),
                in_evaluation_mode(session.loaded.module),
                wide_products(session.loaded.module, self.device),
                session.profile.watching(),
            ):
                streams = session.loaded.checkpoint is not None
                if not streams:
                    self.refuse_what_streams(session.loaded.note or "this one is not")
                session.identify()
                if begin is not None:
                    begin(session)
                if streams:
                    return prune_streamed(session)
                with session.observed(self.runs):
                    search_allocations(session, self.runs)
                    return [prune_in_memory(session, self.runs[0])]

    def open(self, group: Group, streamed: bool) -> Session:
        """Load the model and the calibration data, and give the runs their blocks.

        Args:
            group: The processes that share the work.
            streamed: Whether weights stay on disk, if they can.
        """
        recipe, registry = self.runs[0].recipe, self.plugins.registry
        progress = as_progress(self.resources.progress) if group.first else Progress()
        peak, profile = PeakMemory(self.device), Profile(self.device, self.resources.profile)
        with profile.stage("load"), progress.stage("loading the model"):
            loaded = load_model(self.model, recipe.dtype, self.processor, registry, recipe.adapter_options, streamed)
        blocks, excluded = split_excluded(loaded.adapter.blocks(loaded.module), recipe.exclude)
        data, streams = Calibration([], {}), {}
        if self.calibration is not None and any(run.uses_data for run in self.runs):
            tokens_a_batch = self.resources.budgets.tokens_a_batch(blocks, self.device)
            asked = (recipe, loaded, tokens_a_batch, progress, group.size)
            with profile.stage("data"):
                data = collect(self.calibration, recipe.calibration, *asked)
                named = self.streams.items()
                streams = {name: collect(stream, recipe.streams.get(name), *asked, name) for name, stream in named}
        for run in self.runs:
            run.blocks, run.excluded, run.profile = blocks, excluded, profile
            run.plugins = plugin_sources([*run.parts, loaded.adapter], [*run.requires, *needed_to_allocate(run)])
            run.observers = run.observers if group.first else []
            run.warnings += [*([loaded.note] if loaded.note else []), *loaded.remarks]
            for used in (data, *streams.values()) if run.uses_data else ():
                run.warnings += used.warnings
        shared = (self.device, self.resources, group, progress, peak, self.plugins.hook)
        return Session(self.runs, loaded, data, *shared, streams)

    def _refuse_in_company(self, group: Group) -> None:
        """Reject what only one process can do."""
        for run in self.runs:
            check_processes(run.recovery, group)
            if run.allocator is not None and searches(run.allocator) and group.size > 1:
                raise PruneForgeError(
                    f"allocator {run.allocator.name!r} searches, which takes one process, and there are {group.size}; "
                    "search in one, and give the others the allocation that its report holds, as a file"
                )

    def refuse_what_streams(self, why: str) -> None:
        """Raise if something is asked for that only a streamed run can do.

        Args:
            why: Why this run is not streamed.

        Raises:
            PruneForgeError: Naming it.
        """
        asked = {
            "resume": self.resources.resume,
            "memory budget": self.resources.budgets != Budgets(),
            "gradient cache": self.resources.gradient_cache is not None,
            "more than one metric or pattern": len(self.runs) > 1,
        }
        for what, is_asked in asked.items():
            if is_asked:
                raise PruneForgeError(f"{what} needs a model that is streamed from its folder, and {why}")


def make_job(
    model: str | Path | nn.Module,
    metric: Metrics,
    calibration: Data | None = None,
    *,
    patterns: Sequence[float | str] | None = None,
    output: str | Path | None = None,
    processor: Any = None,
    **settings: Any,
) -> Job:
    """Return a job; its arguments are those of `pruneforge.prune`, or with `patterns` of `pruneforge.prune_each`.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit, as far as that shows without the model.
    """
    installed = loaded_plugins()
    given = {name: value for name, value in settings.items() if value is not None}
    known = {*PruneRecipe.model_fields, *Resources.model_fields} - {"plugins"}  # those that are loaded
    for name in given:
        if name not in known:
            raise unknown_name("setting", name, sorted(known))
    resources = validated(Resources, **{name: given.pop(name) for name in Resources.model_fields if name in given})
    folder = Path(output) if output is not None else None
    given_streams = given.pop("streams", {})
    if not isinstance(given_streams, Mapping):
        raise PruneForgeError(f"streams={given_streams!r} must be a mapping of names to sources, paths or batches")
    recipes, methods = make_methods(model, metric, calibration, given_streams, given, installed)
    if patterns is None:
        label, *others = methods
        if others:
            raise PruneForgeError("several metrics are for prune_each; prune and estimate take one")
        runs = [methods[label].run(recipes[label], folder)]
    else:
        assert folder is not None
        runs = make_runs(recipes, methods, patterns, folder)
    for run in runs:
        run.wants_details = resources.details
        run.observers = make_observers(resources.observe, resources.observe_options, installed.registry)
        if run.uses_data and calibration is None:
            raise PruneForgeError(f"{_what_needs_data(run)} needs calibration data; pass `calibration` SOURCE or PATH")
    asked_objective = next(iter(methods.values())).objective
    if asked_objective is not None and all(run.objective is None for run in runs):
        raise PruneForgeError(
            f"objective {asked_objective.name!r} has no say: nothing here requires gradients of the model's loss, or "
            "trains the model"
        )
    recipe = runs[0].recipe
    _check_streams(runs, given_streams)
    data = None
    if calibration is not None:
        if recipe.source_options and not isinstance(calibration, str | Path):
            raise PruneForgeError("source options need a source; these are batches from Python")
        data = opened(calibration, recipe.source_options, installed)
    streams = {name: opened(stream, {}, installed) for name, stream in given_streams.items()}
    device, _, _ = parse_device(recipe.device), parse_dtype(recipe.dtype), resources.budgets
    return Job(model, runs, data, streams, processor, device, resources, installed)


def refuse_single_pattern(settings: Mapping[str, Any]) -> None:
    """Raise if the settings of several runs hold a pattern of one.

    Raises:
        PruneForgeError: Naming it.
    """
    for name in ("sparsity", "pattern"):
        if name in settings:
            raise PruneForgeError(f"prune_each takes its sparsities and patterns as `patterns`, not as {name}=")


def opened(data: Data, options: Mapping[str, Any], installed: Plugins) -> Source | RawBatches:
    """Return a source, which is made before a large model is loaded, or batches as they are."""
    return create_source(data, options, installed.registry) if isinstance(data, str | Path) else data


def _check_streams(runs: Sequence[Run], given: Mapping[str, Data]) -> None:
    """Raise if calibration data that something requires by name are not given, or others are."""
    required = {name: run for run in runs for name in run.streams}
    for name, run in required.items():
        if name not in given:
            raise PruneForgeError(
                f"metric {run.metric.name!r} or what goes with it requires calibration data {name!r}; pass them with "
                "`streams`"
            )
    for name in given:
        if name not in required:
            raise PruneForgeError(f"nothing requires the calibration data {name!r}; leave them out of `streams`")


def _what_needs_data(run: Run) -> str:
    if run.metric.requires:
        return f"metric {run.metric.name!r}"
    refiner = next((refiner for refiner in run.refiners if refiner.requires), None)
    if refiner is not None:
        return f"refiner {refiner.name!r}"
    if run.recovery is not None and (run.recovery.requires or run.recovery.targets or recovers_models(run.recovery)):
        return f"recovery {run.recovery.name!r}"
    if run.allocator is None:
        return "`details`, the error of each layer,"
    return f"allocator {run.allocator.name!r}"
