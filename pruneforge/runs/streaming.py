"""Prune a checkpoint block by block, without loading it whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing

from pruneforge.checkpoint.behind import Behind
from pruneforge.checkpoint.durable import sync, writing
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import FileGradientStore, cache_folder
from pruneforge.engine.hidden_states import HiddenStates
from pruneforge.engine.loop import prune_blocks
from pruneforge.engine.residency import Streamed
from pruneforge.engine.transfers import Transfers, thread_initializer
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.run import Run
from pruneforge.runs.provenance import gradient_identity, run_identity
from pruneforge.runs.result import PruneResult
from pruneforge.runs.search import search_allocations
from pruneforge.runs.session import Session
from pruneforge.runs.streamed_output import WAITING, StreamedOutput


def prune_streamed(session: Session) -> list[PruneResult]:
    """Prune into the runs' folders, and return a result for each run.

    Runs that are finished already are left as they are, if resuming was asked for.

    Raises:
        PruneForgeError: As `pruneforge.prune` says.
    """
    outputs = [StreamedOutput(session, run, run_identity(session, run)) for run in session.runs]
    unfinished = [output for output in outputs if not (session.resources.resume and output.is_finished())]
    if unfinished:
        _prune(session, unfinished)
    dtype = session.runs[0].recipe.dtype
    return [
        PruneResult(
            (output.run.report or output.finished_report() or {}) if session.group.first else {},
            output.folder,
            dtype=dtype,
            profile=session.profile if output in unfinished else None,
        )
        for output in outputs
    ]


def _prune(session: Session, outputs: Sequence[StreamedOutput]) -> None:
    """Make the outputs' runs in one pass, and write what belongs beside their weights."""
    group, runs = session.group, [output.run for output in outputs]
    rooms = session.rooms(runs)  # before anything is written
    with ExitStack() as logs, ExitStack() as opened:  # logs are closed when the folders are let go of
        for output in outputs:
            opened.enter_context(output.opened())
        logs.enter_context(session.observed(runs))
        for output in outputs:  # once every folder is known to take its run
            output.prepare()
        search_allocations(session, runs)
        with session.profile.stage("total"):
            _prune_blocks(session, outputs, *rooms)
            if group.first:
                for output in outputs:
                    output.finish()
        for output in outputs:
            with writing(output.folder):
                if group.first:
                    session.finish(output.run, output.identity, len(outputs))
                    session.describe(output.run, output.folder)
                    sync(output.folder)
        group.gather(None)  # a barrier: the other processes wait until the first has finished the outputs
        opened.close()
        for run in runs if group.first else ():
            session.close_log(run)
    for output in outputs:  # once the others have their results
        if output.failed:
            raise PruneForgeError(
                f"{output.failed}; {str(output.folder)!r} holds the model as it was pruned, which `pruneforge recover` "
                "takes with other options"
            )


def _prune_blocks(session: Session, outputs: Sequence[StreamedOutput], on_host: int, on_device: int) -> None:
    """Prune the blocks that are not finished yet; each is in its output's files when this returns.

    Args:
        session: What the runs share.
        outputs: Their outputs, opened and prepared.
        on_host: Bytes of hidden states that fit in host memory.
        on_device: Bytes of hidden states that fit on the device.
    """
    loaded, device = session.loaded, session.device
    runs: list[Run] = [output.run for output in outputs]
    blocks, first = runs[0].blocks, outputs[0]
    assert loaded.checkpoint is not None
    hidden_states = HiddenStates(device, on_device, on_host, first.folder / f"{WAITING}{session.group.rank}")
    folder = session.resources.gradient_cache or cache_folder()
    sets = {"": session.data, **session.streams}
    stores = {name: FileGradientStore(folder, gradient_identity(session, data)) for name, data in sets.items()}
    residency = Streamed(loaded.module, blocks, device, loaded.checkpoint, first.rewrite, session.profile)
    transfers, writer = Transfers(device), Behind("pruneforge-writer", thread_initializer(device))
    with closing(hidden_states), closing(residency), closing(writer):
        for output in outputs:
            output.write_behind(writer, transfers)
        if any(run.finished < len(blocks) for run in runs):
            chain = Chain(loaded.module, loaded.adapter, blocks, residency, hidden_states, session.objective)
            batches, progress = session.batches, session.progress
            prune_blocks(runs, chain, batches, progress, session.block_pruned, stores, session.group)
        writer.wait()
    reused, added = sum(store.reused for store in stores.values()), sum(store.written for store in stores.values())
    for run in runs:
        run.gradient_cache = {"reused": reused, "added_bytes": added}
        run.activations = {name: tier.peak for name, tier in hidden_states.tiers.items()}
