"""Pruning a checkpoint that never stands in memory whole, from its files to those of the output folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneforge.checkpoint import masks
from pruneforge.checkpoint.behind import Behind
from pruneforge.checkpoint.durable import PARTIAL, sync, writing
from pruneforge.checkpoint.folder import check_output
from pruneforge.checkpoint.journal import JOURNAL_FILE, Journal, difference
from pruneforge.checkpoint.rewrite import Rewrite
from pruneforge.checkpoint.skeleton import stored_layers
from pruneforge.data.calibration import Calibration
from pruneforge.engine.budget import Budgets
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import GradientFiles
from pruneforge.engine.hidden_states import Store
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.processes import Group
from pruneforge.engine.residency import Streamed
from pruneforge.engine.transfers import Transfer, Transfers, thread_initializer
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.interfaces.run import BlockResult, Run
from pruneforge.numerics import all_finite, zeroed
from pruneforge.profile import PROFILE_FILE
from pruneforge.progress import Progress
from pruneforge.runs import recipe as recipes
from pruneforge.runs import report as reports
from pruneforge.runs.provenance import gradient_identity
from pruneforge.runs.recipe import PruneRecipe

OWN = frozenset({masks.MASKS_FILE, reports.REPORT_FILE, recipes.RECIPE_FILE, PROFILE_FILE, JOURNAL_FILE})
"""Files of an earlier pruning run, which are not copied from a model that is pruned once more."""

WAITING = ".activations-"
"""Folder, in the output, of hidden states that find no room in memory; a process each."""


class Output:
    """The output folder of a streamed run: the rewritten checkpoint and the journal.

    Attributes:
        folder: The folder.
        run: The run.
        recipe: What was asked.
        identity: What decides the bytes, which a resumed run must share.
        rewrite: The files in the folder.
    """

    def __init__(
        self, folder: Path, loaded: LoadedModel, run: Run, recipe: PruneRecipe, identity: dict[str, Any]
    ) -> None:
        """Describe the output of `run`; nothing is written yet."""
        assert loaded.checkpoint is not None
        self.folder = folder
        self.run = run
        self.recipe = recipe
        self.identity = identity
        self._stored = stored_layers(loaded.module, run.blocks, loaded.checkpoint)
        self.rewrite = Rewrite(loaded.checkpoint, folder, self._stored)
        self._checkpoint = loaded.checkpoint
        self._journal: Journal | None = None

    def is_finished(self) -> bool:
        """Return whether the folder holds this very run, finished.

        Raises:
            PruneForgeError: It holds another one.
        """
        report = None if (self.folder / JOURNAL_FILE).is_file() else reports.load_report(self.folder)
        if report is None:
            return False
        other = difference(report.get("identity", {}), json.loads(json.dumps(self.identity)))
        if other:
            raise PruneForgeError(
                f"the finished run in {str(self.folder)!r} is another one: {other}; name another folder"
            )
        return True

    @contextmanager
    def opened(self, resume: bool, group: Group) -> Iterator[None]:
        """Hold the folder within the context; nothing but the journal is written yet.

        A run that stops before a block is finished leaves no trace, and neither does one that would stop again.
        """
        if not group.first:
            yield
            return
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        if not (self.folder / JOURNAL_FILE).is_file():
            check_output(self.folder)
        journal = self._journal = Journal(self.folder, self.identity, resume)
        try:
            yield
        except BaseException as error:
            hopeless = isinstance(error, PruneForgeError) and not isinstance(error, UnfinishedError)
            remove = len(journal.entries) <= 1 or (hopeless and not journal.resumed)
            if remove:
                self._remove()
            journal.close()
            with suppress(OSError):  # somebody has put something else into it meanwhile
                for path in made if remove else ():
                    path.rmdir()
            raise
        (self.folder / JOURNAL_FILE).unlink()  # while it is still locked
        journal.close()

    def prepare(self, group: Group) -> None:
        """Lay out the files of an opened folder, and tell the run, in every process, what is finished."""
        if self._journal is not None:
            if not self._journal.entries:
                self.rewrite.prepare()
                self._journal.append({"prepared": True})
            self._forget_waiting()
        entries = group.gather(self._journal.entries[1:] if self._journal is not None else [])[0]
        for entry in entries:
            self.run.pruned.update(entry["pruned"])
            self.run.warnings += entry["notes"]
        self.run.finished = len(entries)

    def _remove(self) -> None:
        for path in [*self.folder.glob(f"*{PARTIAL}"), self.folder / JOURNAL_FILE]:
            path.unlink(missing_ok=True)
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        """Remove hidden states that an earlier process left behind."""
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
        for layer in result.block.layers:
            name, value = layer.name, layer.parameter.data
            stored, _ = self._stored[name]
            if stored.dtype == value.dtype:
                tensors[stored.name] = value
            elif name in result.updated:
                tensors[stored.name] = value.to(stored.dtype)
                if not all_finite(tensors[stored.name]):
                    raise PruneForgeError(f"an updated weight of layer {name!r} is too large for {stored.dtype}")
                value.copy_(tensors[stored.name])
            else:
                tensors[stored.name] = zeroed(self._checkpoint.read(stored), result.masks[name])
        return tensors

    def keep(self, tensors: dict[str, Tensor], result: BlockResult) -> None:
        """Write a finished block for good."""
        assert self._journal is not None
        self.rewrite.write(tensors, result.masks)
        self._journal.append({"block": result.index, "pruned": result.pruned, "notes": result.notes})


def prune_streamed(
    outputs: Sequence[Output],
    loaded: LoadedModel,
    data: Calibration,
    fingerprint: str,
    *,
    device: torch.device,
    resume: bool,
    budgets: Budgets,
    gradients: Path,
    group: Group,
    progress: Progress,
    block_pruned: Callable[[Run, BlockResult], object],
    conclude: Callable[[Output], object],
) -> None:
    """Prune block by block into the outputs' folders.

    Args:
        outputs: What to do, and where to; they differ in nothing but their patterns.
        loaded: The model, its weights on disk.
        data: The calibration data.
        fingerprint: Of the model.
        device: Where to compute.
        resume: Whether to go on with unfinished runs.
        budgets: What the runs may take in memory.
        gradients: Where gradient statistics are kept for later runs.
        group: The processes that share the work.
        progress: Where to show how far along the runs are.
        block_pruned: Called with each run and block's result.
        conclude: Called with each output when its weights are complete; writes what comes beside them.

    Raises:
        PruneForgeError: As `pruneforge.prune` says.
    """
    assert loaded.checkpoint is not None
    first = outputs[0]
    runs, blocks, profile = [output.run for output in outputs], first.run.blocks, first.run.profile
    host, on_device = budgets.for_activations(blocks, first.run.metric, loaded, data.batches, device, len(outputs))
    with ExitStack() as opened:
        for output in outputs:
            opened.enter_context(output.opened(resume, group))
        for output in outputs:  # once every folder is known to take its run
            output.prepare(group)
        with profile.stage("total"):
            store = Store(device, on_device, host, first.folder / f"{WAITING}{group.rank}")
            files = GradientFiles(gradients, gradient_identity(first.recipe, fingerprint, data, loaded, device))
            residency = Streamed(loaded.module, blocks, device, loaded.checkpoint, first.rewrite, profile)

            transfers, writer = Transfers(device), Behind("pruneforge-writer", thread_initializer(device))

            def finished(run: Run, result: BlockResult) -> None:
                output = next(output for output in outputs if output.run is run)
                stored = output.stored(result)
                if group.first:
                    writer.wait()  # one block is held for it, no more
                    # Copies on CUDA; on the CPU the block's own tensors, which nothing changes before they are written.
                    copies = {name: transfers.to_host(tensor) for name, tensor in stored.items()}
                    writer.start(partial(write, output, result, copies))
                if run is not runs[-1]:
                    writer.wait()  # the next pattern is made from the same weights, in place
                block_pruned(run, result)

            def write(output: Output, result: BlockResult, copies: dict[str, Transfer]) -> None:
                with profile.stage("write", result.index, wait=False):
                    output.keep({name: copy.on_host() for name, copy in copies.items()}, result)

            with closing(store), closing(residency), closing(writer):
                if any(run.finished < len(blocks) for run in runs):
                    chain = Chain(loaded.module, loaded.adapter, blocks, residency, store)
                    prune_blocks(runs, chain, data.batches, progress, finished, files, group)
                writer.wait()
            for run in runs:
                run.gradient_cache = {"reused": files.reused, "added_bytes": files.written}
                run.activations = {name: home.peak for name, home in store.homes.items()}
            if group.first:
                for output in outputs:
                    output.rewrite.finish(OWN)
        for output in outputs:
            with writing(output.folder):
                conclude(output)
                if group.first:
                    sync(output.folder)
        group.gather(None)  # nobody looks at an output before it is complete
