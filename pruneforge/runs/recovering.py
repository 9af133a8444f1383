"""Recover a whole pruned model: one in memory, or one that a folder holds, into files that are swapped at once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pruneforge.checkpoint.durable import sync, writing
from pruneforge.checkpoint.journal import Journal
from pruneforge.checkpoint.masks import load_masks, load_permutations, save_masks
from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.checkpoint.skeleton import layer_locations, missing_parameters
from pruneforge.checkpoint.state import STATE_FILE, forget_state
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.engine.model_recovery import FAILED, PrunedModel, Recovered
from pruneforge.engine.processes import Group
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter, LoadedModel
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.recovery import Recovery, recovers_models
from pruneforge.interfaces.run import Run
from pruneforge.numerics import all_finite
from pruneforge.progress import Progress
from pruneforge.runs.loading import in_evaluation_mode
from pruneforge.runs.session import Session
from pruneforge.wide_products import wide_products

PRUNED = ".pruned"
"""Folder, in the output, of the pruned model that a run recovers: without it nothing takes the output for a model."""

COMPLETE = ".recovered"
"""Folder, in the output, of the recovered files until all are complete."""


def check_processes(recovery: Recovery | None, group: Group) -> None:
    """Raise if several processes are to recover a whole model, which takes one.

    Raises:
        PruneForgeError: Naming the recovery.
    """
    if recovery is not None and recovers_models(recovery) and group.size > 1:
        raise PruneForgeError(
            f"recovery {recovery.name!r} trains the whole model, in one process; prune with several processes without "
            "it, and recover the output with one"
        )


def keep_facts(run: Run, recovered: Recovered) -> None:
    """Put what became of a recovery where the report finds it."""
    run.recovered = recovered.facts
    run.updated |= recovered.updated
    run.warnings += [text for text in recovered.warnings if text not in run.warnings]


def forget_recovery(folder: Path) -> None:
    """Remove what an unfinished recovery left in an output folder."""
    for name in (PRUNED, COMPLETE):
        shutil.rmtree(folder / name, ignore_errors=True)
    forget_state(folder / STATE_FILE)


def give_up(folder: Path, journal: Journal, who: str, error: PruneForgeError) -> Recovered:
    """Put the pruned model into the output as it is, after its recovery failed.

    Hours of pruning are not lost that way: the folder can be recovered again, otherwise.

    Args:
        folder: The output.
        journal: Its journal.
        who: What failed, for the report.
        error: Why.

    Raises:
        UnfinishedError: The folder cannot be written.
    """
    complete = folder / COMPLETE
    with writing(folder):
        shutil.rmtree(complete, ignore_errors=True)
        (folder / PRUNED).rename(complete)
    warning = f"{who} failed, so the model is pruned alone: {error}"
    journal.append({"recovered": {"updated": [], "facts": {FAILED: str(error)}, "warnings": [warning]}})
    return _published(folder, journal)


def _published(folder: Path, journal: Journal) -> Recovered:
    """Move complete files to their places, and return what the journal notes of them."""
    complete = folder / COMPLETE
    noted = next(entry["recovered"] for entry in journal.entries if "recovered" in entry)
    with writing(folder):
        if complete.is_dir():
            # The configuration comes last: without it no library takes the folder for a model.
            for path in sorted(complete.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(folder / path.name)
            sync(folder)
        forget_recovery(folder)
        sync(folder)
    return Recovered(frozenset(), frozenset(noted["updated"]), noted["facts"], noted["warnings"])


@dataclass(frozen=True)
class Training:
    """A recovery of a whole model, with what it learns from.

    Attributes:
        recovery: The recovery.
        adapter: The model's adapter.
        batches: The calibration data.
        device: Where to compute.
        seed: Seed of every random choice.
        objective: The loss; by default the adapter's.
        progress: Shows progress.
    """

    recovery: Recovery
    adapter: Adapter
    batches: Sequence[Batch]
    device: torch.device
    seed: int
    objective: Objective | None
    progress: Progress

    @classmethod
    def of_run(cls, session: Session, run: Run) -> Training:
        """Return the recovery that a run asks for."""
        assert run.recovery is not None
        adapter, batches, progress = session.loaded.adapter, session.data.batches, session.progress
        return cls(run.recovery, adapter, batches, session.device, run.seed, run.objective, progress)

    def recover(self, module: nn.Module, masks: Mapping[str, Tensor], state: Path | None = None) -> Recovered:
        """Recover a model in memory, and go on from a state that an earlier process left.

        Args:
            module: The pruned model, which is changed in place.
            masks: Boolean [out, in] by layer name.
            state: The file of the state; `None` to keep none.
        """
        given = (self.batches, self.device, self.seed, self.objective, state, self.progress)
        site = PrunedModel(module, self.adapter, masks, *given)
        with in_evaluation_mode(module), wide_products(module, self.device):
            return site.recover(self.recovery)

    def recover_folder(
        self, source: Path, folder: Path, journal: Journal, dtype: torch.dtype | None, own: frozenset[str]
    ) -> Recovered:
        """Recover the model in a folder, and put its files into another one.

        They are written beside their places and noted in the journal once all are complete. What is interrupted before
        goes on from the last state, and what is interrupted after goes on with moving them.

        Args:
            source: The pruned model, with its masks.
            folder: The folder to write to.
            journal: Its journal.
            dtype: Dtype to compute in; `None` for the checkpoint's.
            own: Names of files of a pruned model's own, which are not copied.

        Raises:
            PruneForgeError: The recovery fails.
            UnfinishedError: The folder cannot be written.
        """
        complete, state = folder / COMPLETE, folder / STATE_FILE
        if not any("recovered" in entry for entry in journal.entries):
            shutil.rmtree(complete, ignore_errors=True)
            masks, permutations = load_masks(source), load_permutations(source)
            module, processor = self.adapter.load(str(source), dtype)
            recovered = self.recover(module, masks, state)
            with writing(folder):
                complete.mkdir()
            skeleton = self.adapter.skeleton(str(source), dtype)
            checkpoint = Checkpoint(source, skeleton.prefix) if skeleton is not None else None
            if checkpoint is not None and not missing_parameters(module, checkpoint):
                loaded = LoadedModel(module, self.adapter, processor, str(source), checkpoint)
                rewrite(loaded, masks, permutations, recovered.changed, complete, own)
            else:
                with writing(folder):
                    self.adapter.save(module, processor, complete)
                    save_masks(masks, complete, permutations)
            with writing(folder):
                sync(complete)
            noted = {"updated": sorted(recovered.updated), "facts": recovered.facts, "warnings": recovered.warnings}
            journal.append({"recovered": noted})
        return _published(folder, journal)


def rewrite(
    loaded: LoadedModel,
    masks: Mapping[str, Tensor],
    permutations: Mapping[str, Tensor],
    changed: frozenset[str],
    folder: Path,
    own: frozenset[str],
) -> None:
    """Write a recovered model as its checkpoint is laid out; what did not change keeps its bytes.

    Args:
        loaded: The model, with the checkpoint of the pruned weights.
        masks: Boolean [out, in] by layer name.
        permutations: Order of the columns [in], by layer name, if the masks fit N:M in that order.
        changed: Full names of the parameters that changed.
        folder: An empty folder.
        own: Names of files not to copy.

    Raises:
        PruneForgeError: A value is too large for the checkpoint's dtype.
        UnfinishedError: The disk is full or cannot be written.
    """
    module, checkpoint = loaded.module, loaded.checkpoint
    assert checkpoint is not None
    blocks = loaded.adapter.blocks(module)
    left = [layer for block in blocks for layer in block.layers if layer.name not in masks]
    locations = layer_locations(module, blocks, checkpoint)
    names = dict(module.named_parameters(remove_duplicate=False))
    ids = {id(names[name]) for name in changed}
    parameters: dict[str, nn.Parameter] = {}  # by tensor: what is used in several places may be stored several times
    for name, parameter in names.items():
        location = checkpoint.find(name)
        if location is not None and id(parameter) in ids:
            parameters[location.name] = parameter
    pruned = {name: locations[name] for name in masks}
    others = [checkpoint.tensors[name] for name in parameters]
    copy = Rewrite(checkpoint, folder, pruned, others, bool(permutations))
    copy.prepare()
    copy.write({}, masks, permutations)
    for name in dict.fromkeys([*parameters, *(location.name for location, _ in pruned.values())]):
        location = checkpoint.tensors[name]
        stored = checkpoint.read(location)
        if name in parameters:
            dense = [(layer, layer.view(stored)) for layer in left if layer.parameter is parameters[name]]
            stored = parameters[name].detach().to("cpu", location.dtype, copy=True)
            if not all_finite(stored):
                raise PruneForgeError(f"the recovered {name!r} is too large for {location.dtype}")
            for layer, weight in dense:  # which the dtype of the run may have rounded
                layer.view(stored).copy_(weight)
        copy.write({name: stored}, {}, {})
    copy.finish(own)
