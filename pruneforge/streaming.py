"""Pruning a checkpoint that never stands in memory whole, from its files to those of the output folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneforge import report as reports
from pruneforge.budget import Budgets
from pruneforge.calibration import Calibration
from pruneforge.checkpoint.journal import FILE as JOURNAL
from pruneforge.checkpoint.journal import Journal, difference
from pruneforge.checkpoint.output import check_output
from pruneforge.checkpoint.rewrite import PARTIAL, Rewrite, sync, writing
from pruneforge.engine.activations import Store
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import GradientFiles
from pruneforge.engine.group import Group
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.run import BlockResult, Run
from pruneforge.engine.streamed import Streamed, stored_parameters
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.layer import all_finite, zeroed
from pruneforge.model import LoadedModel
from pruneforge.progress import Progress
from pruneforge.recipe import PruneRecipe

DECIDING = ("pruneforge", "torch", "transformers", "timm")
"""Packages of which another version may give other bytes."""

WAITING = ".activations-"
"""Folder, in the output, of hidden states that find no room in memory; a process each."""


class Output:
    """The output folder of a streamed run: the rewritten checkpoint and the journal.

    Attributes:
        folder: The folder.
        rewrite: The files in it.
    """

    def __init__(self, folder: Path, loaded: LoadedModel, run: Run) -> None:
        """Describe the output of `run`; nothing is written yet."""
        assert loaded.checkpoint is not None
        self.folder = folder
        stored = stored_parameters(loaded.module, loaded.checkpoint)
        self._layers = {la.name: (stored[id(la.parameter)], la) for block in run.blocks for la in block.layers}
        layers = {name: (tensor.name, layer.shape) for name, (tensor, layer) in self._layers.items()}
        self.rewrite = Rewrite(loaded.checkpoint, folder, layers)
        self._checkpoint = loaded.checkpoint
        self._journal: Journal | None = None

    @contextmanager
    def opened(self, identity: dict[str, Any], resume: bool, group: Group) -> Iterator[list[dict[str, Any]]]:
        """Hold the folder within the context and yield what the journal says of finished blocks, to every process.

        A run that stops before a block is finished leaves no trace, and neither does one that would stop again.
        """
        if not group.first:
            yield group.gather(None)[0] or []
            return
        new = not self.folder.exists()
        if not (self.folder / JOURNAL).is_file():
            check_output(self.folder)
        journal = self._journal = Journal(self.folder, identity, resume)
        try:
            if not journal.entries:
                self.rewrite.prepare()
                journal.append({"prepared": True})
            entries = journal.entries[1:]
            group.gather(entries)
            yield entries
        except BaseException as error:
            hopeless = isinstance(error, PruneForgeError) and not isinstance(error, UnfinishedError)
            remove = len(journal.entries) <= 1 or (hopeless and not journal.resumed)
            if remove:
                self._remove()
            journal.close()
            if remove and new:
                with suppress(OSError):  # somebody has put something else into it meanwhile
                    self.folder.rmdir()
            raise
        (self.folder / JOURNAL).unlink()  # while it is still locked
        journal.close()

    def _remove(self) -> None:
        for path in [*self.folder.glob(f"*{PARTIAL}"), self.folder / JOURNAL]:
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f"{WAITING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        """Return a finished block's weights as they will be stored, by tensor name.

        Weights that the metric did not change are those of the checkpoint, whatever dtype was computed in. Those it
        did change go on in the block as they are rounded for the checkpoint.

        Raises:
            PruneForgeError: A changed weight is too large for the checkpoint's dtype.
        """
        tensors: dict[str, Tensor] = {}
        for name, mask in result.masks.items():
            stored, layer = self._layers[name]
            value = layer.parameter.data
            if stored.dtype == value.dtype:
                tensors[stored.name] = value
            elif name in result.updated:
                tensors[stored.name] = value.to(stored.dtype)
                if not all_finite(tensors[stored.name]):
                    raise PruneForgeError(f"an updated weight of layer {name!r} is too large for {stored.dtype}")
                value.copy_(tensors[stored.name])
            else:
                tensors[stored.name] = zeroed(self._checkpoint.read(stored), mask)
        return tensors

    def keep(self, tensors: dict[str, Tensor], result: BlockResult) -> None:
        """Write a finished block for good."""
        assert self._journal is not None
        self.rewrite.write(tensors, result.masks)
        pruned = {name: mask.numel() - int(mask.count_nonzero()) for name, mask in result.masks.items()}
        self._journal.append({"block": result.index, "pruned": pruned, "notes": result.notes})


def prune_streamed(
    run: Run,
    loaded: LoadedModel,
    data: Calibration,
    recipe: PruneRecipe,
    folder: Path,
    *,
    device: torch.device,
    resume: bool,
    budgets: Budgets,
    gradients: Path,
    group: Group,
    progress: Progress,
    block_pruned: Callable[[BlockResult], object],
    conclude: Callable[[str, dict[str, Any]], object],
) -> bool:
    """Prune block by block into `folder`; return whether there was anything to do.

    Args:
        run: What to do.
        loaded: The model, its weights on disk.
        data: The calibration data.
        recipe: What was asked; with the fingerprints it decides whether a run can be resumed.
        folder: The output folder.
        device: Where to compute.
        resume: Whether to go on with an unfinished run.
        budgets: What the run may take in memory.
        gradients: Where gradient statistics are kept for later runs.
        group: The processes that share the work.
        progress: Where to show how far along the run is.
        block_pruned: Called with each block's result.
        conclude: Called with the fingerprint of the dense model, and all that decides the bytes, when the weights
            are complete; writes what comes beside them.

    Raises:
        PruneForgeError: As `pruneforge.prune` says.
    """
    assert loaded.checkpoint is not None
    with run.timed("total"), run.timed("fingerprint"):
        fingerprint = group.gather(loaded.checkpoint.fingerprint() if group.first else "")[0]
        output = Output(folder, loaded, run)
    host, on_device = budgets.for_activations(run.blocks, run.metric, loaded.module, device)
    identity = run_identity(recipe, fingerprint, data, group, device)
    if resume and _is_finished(folder, identity):
        return False
    with output.opened(identity, resume, group) as entries:
        for entry in entries:
            run.pruned.update(entry["pruned"])
            run.warnings += entry["notes"]
        run.finished = len(entries)
        with run.timed("total"):
            waiting = folder / f"{WAITING}{group.rank}"
            shutil.rmtree(waiting, ignore_errors=True)
            store = Store(device, on_device, host, waiting)
            files = GradientFiles(gradients, gradient_identity(recipe, fingerprint, data, loaded, device))
            residency = Streamed(loaded.module, run.blocks, device, loaded.checkpoint, output.rewrite)

            def finished(result: BlockResult) -> None:
                tensors = output.stored(result)
                if group.first:
                    output.keep(tensors, result)
                block_pruned(result)

            try:
                if run.finished < len(run.blocks):
                    chain = Chain(loaded.module, loaded.adapter, run.blocks, residency, store)
                    prune_blocks(run, chain, data.batches, progress, finished, files, group)
            finally:
                residency.close()
                store.close()
            run.gradient_cache = {"reused": files.reused, "added_bytes": files.written}
            run.activations = {name: home.peak for name, home in store.homes.items()}
            if group.first:
                output.rewrite.finish()
        with writing(folder):
            conclude(fingerprint, identity)
            if group.first:
                sync(folder)
        group.gather(None)  # nobody looks at the output before it is complete
    return True


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Return whether `folder` holds this very run, finished.

    Raises:
        PruneForgeError: It holds another one.
    """
    report = None if (folder / JOURNAL).is_file() else reports.load_report(folder)
    if report is None:
        return False
    other = difference(report.get("identity", {}), json.loads(json.dumps(identity)))
    if other:
        raise PruneForgeError(f"the finished run in {str(folder)!r} is another one: {other}; name another folder")
    return True


def run_identity(
    recipe: PruneRecipe, fingerprint: str, data: Calibration, group: Group, device: torch.device
) -> dict[str, Any]:
    """Return what decides the bytes of a run's output."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "plugin file": {path: _hash(Path(path)) for path in recipe.plugins},
        "model": {"fingerprint": fingerprint},
        "calibration data": {"fingerprint": data.description.get("fingerprint")},
        "processes": group.size,
        "device": device.type,
        "version of": _versions(),
    }


def gradient_identity(
    recipe: PruneRecipe, fingerprint: str, data: Calibration, loaded: LoadedModel, device: torch.device
) -> dict[str, Any]:
    """Return what gradients of the dense model depend on: the model, the data, the loss."""
    return {
        "format": 1,
        "model": fingerprint,
        "dtype": str(next(loaded.module.parameters()).dtype),
        "calibration data": data.description.get("fingerprint"),
        "loss": data.description.get("loss"),
        "adapter": {"name": loaded.adapter.name, "options": recipe.adapter_options},
        "device": device.type,
        "version of": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: version for name, version in reports.versions().items() if name in DECIDING}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
