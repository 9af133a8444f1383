"""`pruneforge.recover`: recover a whole model that was pruned before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruneforge.checkpoint.durable import sync, writing
from pruneforge.checkpoint.journal import JOURNAL_FILE, Journal, difference, held
from pruneforge.checkpoint.masks import file_of, load_masks
from pruneforge.checkpoint.state import STATE_FILE
from pruneforge.data.calibration import Data, RawBatches, collect
from pruneforge.engine.budget import Budgets
from pruneforge.engine.processes import joined
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.recipe import RecoverRecipe
from pruneforge.interfaces.recovery import Recovery, recovers_models
from pruneforge.interfaces.source import Source
from pruneforge.memory import PeakMemory, one_line_for_full_devices
from pruneforge.numerics import exact_arithmetic
from pruneforge.plugins import loaded_plugins
from pruneforge.profile import Profile
from pruneforge.progress import Progress, as_progress
from pruneforge.runs.documented import documented
from pruneforge.runs.job import opened
from pruneforge.runs.loading import load_model, parse_device, parse_dtype
from pruneforge.runs.parts import described, make_objective, make_recovery
from pruneforge.runs.places import check_place
from pruneforge.runs.provenance import fingerprint, plugin_sources, recovery_identity, versions
from pruneforge.runs.recipe_file import RECIPE_FILE, validated
from pruneforge.runs.recovering import Training, check_processes, forget_recovery
from pruneforge.runs.report import added, measurements
from pruneforge.runs.report_file import REPORT_FILE, load_report, save_report
from pruneforge.runs.resources import Resources
from pruneforge.runs.result import PruneResult
from pruneforge.runs.streamed_output import OWN_FILES


@documented(RecoverRecipe, Resources)
def recover(  # noqa: D417 -- the settings are described where they are declared
    model: str | Path,
    recover: str | Recovery,
    calibration: Data | None = None,
    *,
    output: str | Path,
    samples: int = 128,
    seqlen: int | None = None,
    batch_size: int | None = None,
    source_options: Mapping[str, Any] | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    recover_options: Mapping[str, Any] | None = None,
    objective: str | Objective | None = None,
    objective_options: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: bool | Progress = False,
) -> PruneResult:
    """Recover a whole model that was pruned before, under the masks that its folder holds.

    The output keeps the folder's files, its recipe and report; this adds to the report what was done. Evaluations are
    left out, since they are of other weights.

    Args:
        model: Folder that `prune` or `recover` wrote.
        recover: Name of a recovery of the whole model, or a `Recovery`.
        calibration: As for `prune`.
        output: Folder to write to; it must be absent or empty, or hold an unfinished recovery to resume.
        objective: Name of an objective, or an `Objective`, the loss to train for; by default the one that the model was
            trained for.
        {settings}

    Returns:
        The recovered model, its masks and the report.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit, or the folder is not a pruned model.
    """
    return _asked(**locals()).run()


@dataclass(frozen=True)
class _Asked:
    """A recovery of a folder, checked as far as it can be without the model.

    Attributes:
        recipe: What is asked for.
        recovery: The recovery.
        objective: The loss; by default the adapter's.
        data: The calibration data.
        source: The folder of the pruned model.
        report: Its report.
        folder: The folder to write to.
        resume: Whether to go on with an unfinished recovery.
        progress: Progress bars.
    """

    recipe: RecoverRecipe
    recovery: Recovery
    objective: Objective | None
    data: Source | RawBatches
    source: Path
    report: dict[str, Any]
    folder: Path
    resume: bool
    progress: Progress

    def run(self) -> PruneResult:
        """Recover, and return the result."""
        device, dtype = parse_device(self.recipe.device), self.recipe.dtype
        peak, profile = PeakMemory(device), Profile(device)
        with (
            joined(device) as group,
            exact_arithmetic(self.recipe.seed, device),
            one_line_for_full_devices(),
        ):
            check_processes(self.recovery, group)
            training, entry, warnings = self._prepared(device, profile)
            if self.resume and self._is_finished(entry["identity"]):
                return PruneResult(load_report(self.folder) or {}, self.folder, dtype=dtype)
            with held(self.folder, entry["identity"], self.resume, self._is_started, self._forget) as journal:
                with profile.stage("recover"):
                    source, target = self.source, self.folder
                    recovered = training.recover_folder(source, target, journal, parse_dtype(dtype), OWN_FILES)
                warnings += recovered.warnings
                measured = measurements(profile, peak.read())
                report = added(self.report, entry | recovered.facts, recovered.updated, warnings, measured)
                with writing(self.folder):
                    if (self.source / RECIPE_FILE).is_file():
                        shutil.copyfile(self.source / RECIPE_FILE, self.folder / RECIPE_FILE)
                    save_report(report, self.folder)
                    sync(self.folder)
        return PruneResult(report, self.folder, dtype=dtype, profile=profile)

    def _prepared(self, device: torch.device, profile: Profile) -> tuple[Training, dict[str, Any], list[str]]:
        """Return the training, its entry in the report, and warnings about the data; no weights stay in memory."""
        recipe, registry = self.recipe, loaded_plugins().registry
        with profile.stage("load"), self.progress.stage("loading the model"):
            loaded = load_model(self.source, recipe.dtype, None, registry, recipe.adapter_options, on_disk=True)
        tokens = Budgets().tokens_a_batch(loaded.adapter.blocks(loaded.module), device)
        with profile.stage("data"):
            seen = collect(self.data, recipe.calibration, recipe, loaded, tokens, self.progress)
        pruned = loaded.checkpoint.fingerprint() if loaded.checkpoint else fingerprint(loaded.module)
        parts: list[Configurable] = [self.recovery, loaded.adapter]
        plugins = plugin_sources(parts if self.objective is None else [*parts, self.objective])
        masks = file_of(self.source)
        entry = {
            "name": self.recovery.name,
            "options": self.recovery.options.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "calibration": seen.description,
            "versions": versions(),
            "plugins": plugins,
            "identity": recovery_identity(recipe, plugins, pruned, masks, seen.description, device),
        }
        given = (seen.batches, device, recipe.seed, self.objective, self.progress)
        return Training(self.recovery, loaded.adapter, *given), entry, seen.warnings

    def _is_finished(self, identity: dict[str, Any]) -> bool:
        """Return whether the output holds this very recovery, finished.

        Raises:
            PruneForgeError: It holds another one.
        """
        report = None if (self.folder / JOURNAL_FILE).is_file() else load_report(self.folder)
        if report is None:
            return False
        last: dict[str, Any] = next(iter(report.get("recovered", [])[-1:]), {})
        other = difference(last.get("identity", {}), json.loads(json.dumps(identity)))
        if other:
            raise PruneForgeError(f"what {str(self.folder)!r} holds is another one: {other}; name another folder")
        return True

    def _is_started(self, journal: Journal) -> bool:
        return bool(journal.entries) or (self.folder / STATE_FILE).is_file()

    def _forget(self) -> None:
        forget_recovery(self.folder)


def _asked(
    model: str | Path,
    recover: str | Recovery,
    calibration: Data | None,
    output: str | Path,
    resume: bool,
    progress: bool | Progress,
    objective: str | Objective | None,
    recover_options: Mapping[str, Any] | None,
    objective_options: Mapping[str, Any] | None,
    **settings: Any,
) -> _Asked:
    """Return what the arguments of `recover` ask for.

    Raises:
        PruneForgeError: Something does not exist or does not fit.
    """
    plugins, source = loaded_plugins(), Path(model)
    options = {"recover": dict(recover_options or {}), "objective": dict(objective_options or {})}
    made = make_recovery(recover, options["recover"], plugins.registry)
    loss = make_objective(objective, options["objective"], plugins.registry)
    assert made is not None
    if not recovers_models(made):
        raise PruneForgeError(
            f"recovery {made.name!r} needs the dense weights of each block, which a pruned folder does not have; "
            "use it in the run that prunes"
        )
    if calibration is None:
        raise PruneForgeError(f"recovery {made.name!r} needs calibration data; pass `calibration` SOURCE or PATH")
    recipe = validated(
        RecoverRecipe,
        model=str(model),
        calibration=str(calibration) if isinstance(calibration, str | Path) else None,
        plugins=[plugin.origin for plugin in plugins.loaded if plugin.from_file],
        **described({"recover": recover, "objective": objective}, {"recover": made, "objective": loss}, options),
        **{name: value for name, value in settings.items() if value is not None},
    )
    check_place(str(model))
    load_masks(source)
    report = load_report(source)
    if report is None or (source / JOURNAL_FILE).is_file():
        raise PruneForgeError(f"{str(model)!r} holds no finished {REPORT_FILE}; it is not the output of a pruning run")
    data = opened(calibration, recipe.source_options, plugins)
    return _Asked(recipe, made, loss, data, source, report, Path(output), resume, as_progress(progress))
