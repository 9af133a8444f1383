"""Let allocators search: prune copies of the dense model by their allocations, and evaluate them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from pruneforge.engine.allocation import sizes_of, steps_of
from pruneforge.engine.guard import named, seed_for
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.allocator import Allocator, Trials, searches
from pruneforge.interfaces.run import Run
from pruneforge.plugins import Plugins, loaded_plugins
from pruneforge.profile import Profile
from pruneforge.runs.evaluate import evaluate
from pruneforge.runs.in_memory import prune_in_memory
from pruneforge.runs.loading import in_evaluation_mode, load_model
from pruneforge.runs.plan import split_excluded
from pruneforge.runs.provenance import fingerprint, run_identity
from pruneforge.runs.session import Session

BESIDE = ".search"
"""How the folder of a search is called, after the name of the output that it stands beside."""


def search_allocations(session: Session, runs: Sequence[Run]) -> None:
    """Set the allocation of each run whose allocator searches, unless an earlier process has found it.

    Each run is searched for on its own, before the pass that the runs share.

    Raises:
        PruneForgeError: The search or a trial fails.
    """
    for run in runs:
        if run.allocator is not None and searches(run.allocator) and run.allocation is None:
            with session.profile.stage("total"), session.profile.stage("search"):
                _search(session, run, run.allocator)


def _search(session: Session, run: Run, allocator: Allocator) -> None:
    trials = PruningTrials(session, run, allocator)
    sizes, sparsity = sizes_of(run.blocks), run.pattern.sparsity
    seed_for(run.seed, "allocate", torch.device("cpu"))
    who = f"allocator {allocator.name!r}"
    asked = named(who, "to search", lambda: allocator.search(trials, sizes, sparsity))
    layers = [layer for block in run.blocks for layer in block.layers]
    run.allocation, run.search = steps_of(asked, allocator, layers, run.pattern), trials.found
    run.output.allocated(run.allocation)


class PruningTrials(Trials):
    """Prunes and evaluates with the method, the data and the resources of one run."""

    def __init__(self, session: Session, run: Run, allocator: Allocator) -> None:
        self._session, self._run, self._allocator = session, run, allocator
        whole = run.folder.resolve() if run.folder is not None else None  # "." has no name
        self.folder = whole.with_name(whole.name + BESIDE) if whole is not None else None
        self.seed = run.seed
        self.progress = session.progress
        self.found = {}
        identity = json.loads(json.dumps(run_identity(session, run)))
        recipe = identity.pop("recipe")
        del recipe["allocator"], recipe["allocator_options"]
        self.identity = {**recipe, **identity}

    def evaluate(self, allocation: Mapping[str, float], task: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Prune and evaluate a copy of the dense model; see `Trials`."""
        session, run, recipe = self._session, self._run, self._run.recipe
        loaded = self._copy()
        blocks, excluded = split_excluded(loaded.adapter.blocks(loaded.module), recipe.exclude)
        trial = Run(recipe, run.metric, run.pattern, None, run.allocator, run.refiners, run.recovery, run.objective)
        trial.blocks, trial.excluded, trial.plugins = blocks, excluded, run.plugins
        trial.profile = Profile(session.device)
        layers = [layer for block in blocks for layer in block.layers]
        trial.allocation = steps_of(allocation, self._allocator, layers, run.pattern)
        # Plugins that observe runs are told of the run that is asked for alone.
        own = replace(session, runs=[trial], loaded=loaded, hook=Plugins().hook, fingerprint=fingerprint(loaded.module))
        with in_evaluation_mode(loaded.module):
            pruned = prune_in_memory(own, trial)
        device, dtype = str(session.device), recipe.dtype
        return evaluate(pruned, task, options, device=device, dtype=dtype, seed=recipe.seed, progress=session.progress)

    def _copy(self) -> LoadedModel:
        """Return the dense model once more, whole: a streamed one from its files."""
        loaded, recipe = self._session.loaded, self._run.recipe
        if loaded.checkpoint is None:
            return replace(loaded, module=deepcopy(loaded.module))
        registry = loaded_plugins().registry
        return load_model(loaded.reference, recipe.dtype, loaded.processor, registry, recipe.adapter_options)
