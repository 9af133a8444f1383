"""One pass over a model and its calibration data, and the runs that share it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pruneforge.checkpoint.durable import writing
from pruneforge.checkpoint.skeleton import check_others
from pruneforge.data.calibration import Calibration
from pruneforge.engine.guard import named
from pruneforge.engine.processes import Group
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.memory import PeakMemory
from pruneforge.profile import PROFILE_FILE, Profile
from pruneforge.progress import Progress
from pruneforge.runs import observers, provenance
from pruneforge.runs.recipe_file import save_recipe
from pruneforge.runs.report import make_report
from pruneforge.runs.report_file import save_report
from pruneforge.runs.resources import Resources


@dataclass
class Session:
    """Everything that the runs of one pass share.

    Attributes:
        runs: The runs; each becomes one pruned model.
        loaded: The dense model.
        data: The calibration data.
        streams: Further calibration data, by name.
        device: Where to compute.
        resources: What the runs may use.
        group: The processes that share the work.
        progress: Progress bars; silent in all processes but the first.
        peak: Peak memory since before the model was loaded.
        hook: pluggy's relay to the plugins that observe runs.
        fingerprint: Hash of the dense model, once it is known.
    """

    runs: list[Run]
    loaded: LoadedModel
    data: Calibration
    device: torch.device
    resources: Resources
    group: Group
    progress: Progress
    peak: PeakMemory
    hook: Any
    streams: dict[str, Calibration] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def profile(self) -> Profile:
        """Time and memory by stage and block, of all runs together."""
        return self.runs[0].profile

    @property
    def objective(self) -> Objective | None:
        """The loss of gradient statistics that the runs have in common; `None` for the adapter's."""
        return next((run.objective for run in self.runs if run.objective is not None), None)

    @property
    def batches(self) -> dict[str, list[Batch]]:
        """The batches of all calibration data, by name; those without a name come first."""
        return {"": self.data.batches, **{name: stream.batches for name, stream in self.streams.items()}}

    def description_of(self, run: Run) -> dict[str, Any]:
        """Return the description of the calibration data, as far as a run uses any."""
        streams = {name: self.streams[name].description for name in run.streams}
        return {**self.data.description, **({"streams": streams} if streams else {})} if run.uses_data else {}

    def identify(self) -> None:
        """Hash the dense model, before anything of it is changed.

        Raises:
            PruneForgeError: What is not pruned of it is damaged already.
        """
        checkpoint, blocks = self.loaded.checkpoint, self.runs[0].blocks
        if checkpoint is None:
            check_others(self.loaded.module, blocks, None)
            self.fingerprint = provenance.fingerprint(self.loaded.module)
            return
        with self.profile.stage("total"), self.profile.stage("fingerprint"):
            error: Exception | None = None
            found: dict[str, str] = {}
            if self.group.first:
                try:
                    check_others(self.loaded.module, blocks, checkpoint)
                    found = {"": checkpoint.fingerprint()}
                except Exception as failed:  # of any kind: the other processes wait for what comes of it
                    error = failed
            self.fingerprint = self.group.agree(error, found)[""]

    def rooms(self, runs: list[Run]) -> tuple[int, int]:
        """Return how many bytes of hidden states fit in host memory and on the device; see `Budgets`."""
        batches = [batch for data in self.batches.values() for batch in data]
        return self.resources.budgets.for_activations(runs, self.loaded, batches, self.device)

    def observed(self, runs: Sequence[Run]) -> AbstractContextManager[None]:
        """Have the observers of some runs log them within the context."""
        return observers.observing(runs, several=len(self.runs) > 1)

    def block_pruned(self, run: Run, result: BlockResult) -> None:
        """Tell observers and plugins of a finished block."""
        observers.block_pruned(run, result)
        self.hook.pruneforge_block_pruned(run=run, result=result)

    def finish(self, run: Run, identity: dict[str, Any], together: int) -> dict[str, Any]:
        """Make the report of a run whose blocks are all pruned, and tell plugins.

        Args:
            run: The run.
            identity: Everything that determines its bytes; empty if the run cannot be resumed.
            together: Number of runs that shared the pass.
        """
        measured = {name: known["measured"] for name, known in run.details.items() if "measured" in known}
        if measured:
            who = f"metric {run.metric.name!r}"
            run.warnings += named(who, "on what it measured", lambda: list(run.metric.remarks(measured)))
        run.report = make_report(
            run, self.loaded, self.fingerprint, self.description_of(run) or None, self.peak.read(), identity
        )
        run.report["measured"]["patterns_at_once"] = together
        self.hook.pruneforge_run_finished(run=run, report=run.report)
        return run.report

    def describe(self, run: Run, folder: Path) -> None:
        """Write what belongs beside a finished run's weights: recipe, report and, if asked for, the trace."""
        assert run.report is not None
        save_recipe(run.recipe, folder)
        save_report(run.report, folder)
        if self.resources.profile:
            run.profile.save(folder / PROFILE_FILE)

    def close_log(self, run: Run) -> None:
        """Tell observers of a run's report, once everything is written: one that hangs then costs no result.

        A warning that comes of it is added to the report, in the run's folder too.
        """
        assert run.report is not None
        known = len(run.warnings)
        observers.finished(run, run.report)
        if run.folder is not None and len(run.warnings) > known:
            with writing(run.folder):
                save_report(run.report, run.folder)
