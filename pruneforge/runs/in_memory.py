"""Prune a model that is held in memory whole."""

from __future__ import annotations

from contextlib import closing

from torch import Tensor

from pruneforge.checkpoint.folder import check_output, new_folder
from pruneforge.checkpoint.masks import save_masks
from pruneforge.engine.chain import Chain
from pruneforge.engine.hidden_states import HiddenStates
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.residency import InMemory
from pruneforge.interfaces.recovery import recovers_models
from pruneforge.interfaces.run import BlockResult, Output, Run
from pruneforge.runs.recovering import Training, keep_facts
from pruneforge.runs.result import PruneResult
from pruneforge.runs.session import Session


class Masks(Output):
    """Keeps the masks of a run; the pruned weights stay in the model.

    Attributes:
        masks: Boolean [out, in] by full layer name.
        permutations: Order of the columns [in] in which each mask fits N:M, by full layer name, if the metric permutes.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.permutations: dict[str, Tensor] = {}

    def add(self, result: BlockResult) -> None:
        """Keep a block's masks."""
        self.masks.update(result.masks)
        self.permutations.update(result.permutations)


def prune_in_memory(session: Session, run: Run) -> PruneResult:
    """Prune the model in place and, if the run has a folder, write it there at the end.

    Raises:
        PruneForgeError: As `pruneforge.prune` says.
    """
    if run.folder is not None:
        check_output(run.folder)
    loaded = session.loaded
    run.output = kept = Masks()
    with run.profile.stage("total"):
        residency = InMemory(loaded.module, run.blocks, session.device)
        host, on_device = session.rooms([run])
        with closing(HiddenStates(session.device, on_device, host)) as hidden_states:
            chain = Chain(loaded.module, loaded.adapter, run.blocks, residency, hidden_states, session.objective)
            prune_blocks([run], chain, session.batches, session.progress, session.block_pruned, group=session.group)
        run.activations = {name: tier.peak for name, tier in hidden_states.tiers.items()}
        if recovers_models(run.recovery):
            with run.profile.stage("recover"):
                training = Training.of_run(session, run)
                keep_facts(run, training.recover(loaded.module, kept.masks))
    report = session.finish(run, identity={}, together=1)
    if run.folder is not None and session.group.first:
        with new_folder(run.folder) as folder:
            loaded.adapter.save(loaded.module, loaded.processor, folder)
            save_masks(kept.masks, folder, kept.permutations)
            session.describe(run, folder)
    session.close_log(run)
    return PruneResult(report, loaded=loaded, masks=kept.masks, permutations=kept.permutations, profile=run.profile)
