"""One pass over a model and its calibration data, and the runs that share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruneforge.data.calibration import Calibration
from pruneforge.engine.processes import Group
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.memory import PeakMemory
from pruneforge.profile import PROFILE_FILE, Profile
from pruneforge.progress import Progress
from pruneforge.runs.recipe_file import save_recipe
from pruneforge.runs.report import make_report, save_report
from pruneforge.runs.resources import Resources


@dataclass
class Session:
    """Everything that the runs of one pass share.

    Attributes:
        runs: The runs; each becomes one pruned model.
        loaded: The dense model.
        data: The calibration data.
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
    fingerprint: str = ""

    @property
    def profile(self) -> Profile:
        """Time and memory by stage and block, of all runs together."""
        return self.runs[0].profile

    def data_of(self, run: Run) -> Calibration:
        """Return the calibration data as far as a run uses any."""
        return self.data if run.uses_data else Calibration([], {})

    def block_pruned(self, run: Run, result: BlockResult) -> None:
        """Tell the plugins of a finished block."""
        self.hook.pruneforge_block_pruned(run=run, result=result)

    def finish(self, run: Run, identity: dict[str, Any], together: int) -> dict[str, Any]:
        """Make the report of a run whose blocks are all pruned, and tell the plugins.

        Args:
            run: The run.
            identity: Everything that determines its bytes; empty if the run cannot be resumed.
            together: Number of runs that shared the pass.
        """
        run.report = make_report(
            run, self.loaded, self.fingerprint, self.data_of(run).description or None, self.peak.read(), identity
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
