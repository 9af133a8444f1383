"""The output folder of a streamed run: the rewritten checkpoint and the journal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pruneforge.checkpoint import masks
from pruneforge.checkpoint.behind import Behind
from pruneforge.checkpoint.durable import PARTIAL
from pruneforge.checkpoint.journal import JOURNAL_FILE, Journal, difference, held
from pruneforge.checkpoint.reader import Checkpoint
from pruneforge.checkpoint.skeleton import layer_locations, parameter_locations
from pruneforge.checkpoint.tensors import TensorLocation
from pruneforge.checkpoint.writer import Rewrite
from pruneforge.engine.model_recovery import FAILED
from pruneforge.engine.recovery import recoverable
from pruneforge.engine.transfers import Transfer, Transfers
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.recovery import recovers_blocks, recovers_models
from pruneforge.interfaces.run import BlockResult, Output, Run
from pruneforge.numerics import all_finite, zeroed
from pruneforge.profile import PROFILE_FILE
from pruneforge.runs import recipe_file as recipes
from pruneforge.runs import report_file as reports
from pruneforge.runs.card import CARD_FILE
from pruneforge.runs.loading import parse_dtype
from pruneforge.runs.recovering import COMPLETE, PRUNED, Training, forget_recovery, give_up, keep_facts
from pruneforge.runs.session import Session

OWN_FILES = frozenset(
    {masks.MASKS_FILE, reports.REPORT_FILE, recipes.RECIPE_FILE, PROFILE_FILE, JOURNAL_FILE, CARD_FILE}
)
"""Files of a pruned model's own, which are not copied from the model that is pruned: the card is about that one."""

WAITING = ".activations-"
"""Prefix of the folders, one per process, in the output, for hidden states that do not fit in memory."""


class StreamedOutput(Output):
    """Writes the finished blocks of a run to its folder, and notes each in the journal.

    Attributes:
        run: The run.
        folder: Its folder.
        identity: Everything that determines the bytes; a resumed run must have the same.
        rewrite: The files in the folder.
    """

    def __init__(self, session: Session, run: Run, identity: dict[str, Any]) -> None:
        """Become the output of `run`; nothing is written yet."""
        checkpoint = session.loaded.checkpoint
        assert checkpoint is not None
        assert run.folder is not None
        run.output = self
        self.run = run
        self.folder = run.folder
        self.identity = identity
        self._session = session
        self._checkpoint = checkpoint
        self._locations = layer_locations(session.loaded.module, run.blocks, checkpoint)
        self._others = self._recovered(session.loaded.module) if recovers_blocks(run.recovery) else {}
        others = [location for of_block in self._others.values() for location, _ in of_block.values()]
        self.rewrite = Rewrite(checkpoint, self.folder, self._locations, others, run.metric.permutes)
        self._journal: Journal | None = None
        self._complete = False  # whether this process has given all files their final names
        self._writer: Behind | None = None
        self._transfers: Transfers | None = None
        run.warnings += _left_out(checkpoint)
        self.failed = ""  # why the pruned model could not be recovered

    def is_finished(self) -> bool:
        """Return whether the folder holds this very run, finished.

        Raises:
            PruneForgeError: It holds another one.
        """
        report = self.finished_report()
        if report is None:
            return False
        other = difference(report.get("identity", {}), json.loads(json.dumps(self.identity)))
        if report.get("recovered"):
            other = "it was recovered afterwards"
        if other:
            raise PruneForgeError(
                f"the finished run in {str(self.folder)!r} is another one: {other}; name another folder"
            )
        return True

    def finished_report(self) -> dict[str, Any] | None:
        """Return the report of the finished run in the folder, or `None` if there is none."""
        return None if (self.folder / JOURNAL_FILE).is_file() else reports.load_report(self.folder)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder within the context; nothing but the journal is written yet.

        The folder is removed again if no block was finished, or if resuming would fail the same way.
        """
        if not self._session.group.first:
            yield
            return
        resume = self._session.resources.resume
        with held(
            self.folder, self.identity, resume, lambda journal: len(journal.entries) > 1, self._remove
        ) as journal:
            self._journal = journal
            yield

    def prepare(self) -> None:
        """Create the files of an opened folder, and restore in every process what an earlier one finished."""
        if self._journal is not None:
            if not self._journal.entries:
                self.rewrite.prepare()
                self._journal.append({"prepared": True})
            self.rewrite.check_there([self.folder, self.folder / PRUNED, self.folder / COMPLETE])
            self._forget_waiting()
        entries = self._session.group.gather(self._journal.entries[1:] if self._journal is not None else [])[0]
        for entry in entries:
            if "allocation" in entry:
                self.run.allocation, self.run.search = entry["allocation"], entry.get("search", {})
            elif "block" in entry:
                self.run.pruned.update(entry["pruned"])
                self.run.updated.update(entry.get("updated", ()))
                self.run.details.update(entry.get("details", {}))
                self.run.warnings += entry["notes"]
                self.run.finished += 1

    def _remove(self) -> None:
        names = self.rewrite.names(OWN_FILES) if self._complete else []
        for path in [*self.folder.glob(f"*{PARTIAL}"), *(self.folder / name for name in names)]:
            path.unlink(missing_ok=True)
        self._forget_waiting()
        forget_recovery(self.folder)

    def _forget_waiting(self) -> None:
        """Remove hidden states that an earlier process did not remove."""
        for path in self.folder.glob(f"{WAITING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def write_behind(self, writer: Behind, transfers: Transfers) -> None:
        """Have blocks written by `writer`, which all outputs of a pass share, while the next one is computed."""
        self._writer, self._transfers = writer, transfers

    def add(self, result: BlockResult) -> None:
        """Round a block's weights as they will be stored, and begin to write them."""
        assert self._writer is not None
        assert self._transfers is not None
        tensors = self._tensors_to_write(result)
        if not self._session.group.first:
            return
        self._writer.wait()  # host memory is budgeted for one waiting block
        # Copies on CUDA; on the CPU the block's own tensors, which nothing changes before `settle`.
        copies = {name: self._transfers.to_host(tensor) for name, tensor in tensors.items()}
        self._writer.start(partial(self._write, result, copies))

    def allocated(self, allocation: dict[str, int]) -> None:
        """Note the allocation, which a resumed run does not make again."""
        if self._journal is not None:
            search = {"search": self.run.search} if self.run.search else {}
            self._journal.append({"allocation": allocation, **search})

    def settle(self) -> None:
        """Wait until the last block is written."""
        assert self._writer is not None
        self._writer.wait()

    def finish(self) -> None:
        """Complete the checkpoint's files once all blocks are written, and recover the whole model if asked to."""
        assert self._journal is not None
        pruned = self.folder / PRUNED if recovers_models(self.run.recovery) else self.folder
        if not any("recovered" in entry for entry in self._journal.entries):
            if pruned != self.folder and not pruned.exists() and (self.folder / COMPLETE).exists():
                (self.folder / COMPLETE).rename(pruned)  # stopped while it was given up: tried once more
            self.rewrite.finish(OWN_FILES, pruned)
            self._complete = True
        if pruned != self.folder:
            with self.run.profile.stage("recover"):
                self._recover(pruned)

    def _recover(self, pruned: Path) -> None:
        """Recover the model in `pruned` into the output, or put it there as it is if that fails."""
        assert self._journal is not None
        assert self.run.recovery is not None
        training, dtype = Training.of_run(self._session, self.run), parse_dtype(self.run.recipe.dtype)
        try:
            recovered = training.recover_folder(pruned, self.folder, self._journal, dtype, OWN_FILES)
        except UnfinishedError:
            raise
        except PruneForgeError as error:
            recovered = give_up(self.folder, self._journal, f"recovery {self.run.recovery.name!r}", error)
        keep_facts(self.run, recovered)
        self.failed = recovered.facts.get(FAILED, "")
        if self.failed:  # not what was asked for, so that resuming does not take it for that
            self.identity = {**self.identity, FAILED: self.failed}

    def _recovered(self, module: nn.Module) -> dict[str, dict[str, tuple[TensorLocation, nn.Parameter]]]:
        """Return the parameters, besides layers' weights, that recovery may change: by block and full name."""
        locations = parameter_locations(module, self._checkpoint)
        found: dict[str, dict[str, tuple[TensorLocation, nn.Parameter]]] = {}
        for block in self.run.blocks:
            weights = {id(layer.parameter) for layer in block.layers}
            parameters = recoverable(module, block, self.run.excluded) if block.layers else {}
            found[block.name] = {
                name: (locations[id(parameter)], parameter)
                for name, parameter in parameters.items()
                if id(parameter) not in weights
            }
        return found

    def _tensors_to_write(self, result: BlockResult) -> dict[str, Tensor]:
        """Return a finished block's weights as they will be stored, by tensor name.

        Raises:
            PruneForgeError: A changed weight is too large for the checkpoint's dtype.
        """
        together: dict[str, list[Layer]] = {}  # by tensor, which may hold the weights of several layers
        for layer in result.block.layers:
            together.setdefault(self._locations[layer.name][0].name, []).append(layer)
        tensors = {name: self._tensor_of(layers, result) for name, layers in together.items()}
        for name, (location, parameter) in self._others.get(result.block.name, {}).items():
            tensors[location.name] = self._other_tensor(location, name, parameter, name in result.updated)
        return tensors

    def _tensor_of(self, layers: Sequence[Layer], result: BlockResult) -> Tensor:
        """Return the tensor that holds the weights of `layers`."""
        location, whole = self._locations[layers[0].name][0], layers[0].parameter.data
        if location.dtype == whole.dtype:
            return whole
        all_of_it = sum(layer.size for layer in layers if layer.name in result.updated) == whole.numel()
        stored = whole.to(location.dtype) if all_of_it else self._checkpoint.read(location)
        for layer in layers:
            part, value = layer.view(stored), layer.matrix()
            if layer.name not in result.updated:
                zeroed(part, result.masks[layer.name])
                continue
            part.copy_(value)
            if not all_finite(part):
                raise PruneForgeError(f"an updated weight of layer {layer.name!r} is too large for {location.dtype}")
            value.copy_(part)
        return stored

    def _other_tensor(self, location: TensorLocation, name: str, parameter: nn.Parameter, updated: bool) -> Tensor:
        """Return a parameter that holds no layer's weight."""
        value = parameter.data
        if location.dtype == value.dtype:
            return value
        if not updated:
            return self._checkpoint.read(location)
        stored = value.to(location.dtype)
        if not all_finite(stored):
            raise PruneForgeError(f"the recovered {name!r} is too large for {location.dtype}")
        value.copy_(stored)
        return stored

    def _write(self, result: BlockResult, copies: dict[str, Transfer]) -> None:
        """Write a block, and then the journal's entry that says so."""
        assert self._journal is not None
        with self.run.profile.stage("write", result.index, wait=False):
            tensors = {name: copy.on_host() for name, copy in copies.items()}
            self.rewrite.write(tensors, result.masks, result.permutations)
            entry = {"block": result.index, "pruned": result.pruned, "notes": result.notes}
            further = {"updated": sorted(result.updated), "details": result.details}
            self._journal.append({**entry, **{name: value for name, value in further.items() if value}})


def _left_out(checkpoint: Checkpoint) -> list[str]:
    """Return a warning about what a pruned model does not take over from its checkpoint, if there is anything."""
    ours = reports.is_pruned(checkpoint.folder)  # before: its files are replaced by newer ones
    own = [] if ours else [path for path in checkpoint.companions() if path.name in OWN_FILES - {CARD_FILE}]
    names = [path.name for path in [*own, *checkpoint.left_out()] if not (ours and path.name == masks.FORMER)]
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [
        f"not taken over from the model: {', '.join(map(repr, names[:5]))}{more}; these are folders, weights of other "
        "formats, or bear the name of a file that a pruned model has of its own"
    ]
