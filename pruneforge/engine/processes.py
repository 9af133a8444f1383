"""Share one run among the processes that `torchrun` starts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_map

from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import Statistic

T = TypeVar("T")

HOST = torch.device("cpu")

ON_THIS_MACHINE = "LOCAL_WORLD_SIZE"
"""Variable of how many processes of the run share this machine's memory."""

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another. The first one reads a whole checkpoint while the others wait; NCCL's default
of ten minutes would kill them by a signal, without an error that says why."""


class Group:
    """The processes of a run. A single process is a group of one, in which nothing is exchanged.

    Attributes:
        rank: Number of this process, from 0. The first one writes files and shows progress.
        size: Number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of `items`.

        Raises:
            PruneForgeError: There are fewer items than processes.
        """
        if len(items) < self.size:
            raise PruneForgeError(
                f"{len(items)} batches cannot be split over {self.size} processes; "
                "use fewer processes, a smaller `batch_size` or more `samples`"
            )
        return list(items[self.rank :: self.size])

    def merge(self, statistic: Statistic, device: torch.device) -> None:
        """Merge the statistics of all processes, in place and in every process.

        Args:
            statistic: The statistic of this process's own batches.
            device: Device of the processes' tensors.
        """
        if self.size == 1:
            return
        states_of_own = [name for name, value in vars(statistic).items() if isinstance(value, Tensor)]
        if type(statistic).merge is Statistic.merge and len(states_of_own) > 1:
            raise PruneForgeError(
                f"statistic {type(statistic).__name__} holds {', '.join(states_of_own)}, and the inherited merge adds "
                "up one tensor; it must override merge, state_dict and load_state_dict"
            )
        with _others():
            # The inherited `merge` adds sums, which all-reduce does in place. A subclass that overrides it merges in
            # its own way, which takes every process's state.
            if type(statistic).merge is Statistic.merge:
                dist.all_reduce(statistic.total)
                counts = torch.tensor([statistic.samples, statistic.tokens], dtype=torch.int64, device=device)
                dist.all_reduce(counts)
                statistic.samples, statistic.tokens = counts.tolist()
                return
            states: list[Any] = [None] * self.size
            # Through host memory: a device tensor would be unpickled on the sender's device.
            dist.all_gather_object(states, tree_map(partial(_moved, device=HOST), statistic.state_dict()))
        statistic.load_state_dict(states[0])
        for state in states[1:]:
            # Without `__init__`, which asks for a shape and would allocate sums that the state replaces anyway.
            other = type(statistic).__new__(type(statistic))
            other.load_state_dict(state)
            statistic.merge(other)
        statistic.to(device)

    def agree(self, error: Exception | None, results: dict[str, T]) -> dict[str, T]:
        """Return the results of all processes, or raise in all of them if one had an error.

        Otherwise the others would wait for the failed process until they are killed.

        Raises:
            Exception: This process's own error.
            PruneForgeError: The error of the first other process that had one.
            UnfinishedError: Another process had an error of another kind; the message names it.
        """
        told = error
        # Other processes may not be able to unpickle an error of any other kind.
        if error is not None and not isinstance(error, PruneForgeError):
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            told = UnfinishedError(f"process {self.rank} of the run failed: {reason}")
        joint: dict[str, T] = {}
        outcomes = self.gather((told, results))
        if error is not None:
            raise error
        for other, theirs in outcomes:
            if other is not None:
                raise other
            joint |= theirs
        return joint

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of rank. Also serves as a barrier."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _others():
            dist.all_gather_object(values, value)
        return values

    def send(self, tensor: Tensor, owner: int) -> None:
        """Copy `tensor` of process `owner` into `tensor` of every process, in memory order; strides must agree."""
        if self.size > 1:
            with _others():
                dist.broadcast(tensor, owner)

    def send_weight(self, layer: Layer, owner: int) -> None:
        """Copy a layer's weight of process `owner` into every process.

        Its parameter is not sent whole: it may hold the weights of other layers, of which other processes take care.
        """
        if self.size > 1:
            matrix = layer.matrix()
            weight = matrix.contiguous()
            self.send(weight, owner)
            matrix.copy_(weight)

    def from_owner(self, value: T | None, owner: int, device: torch.device) -> T:
        """Return the value of process `owner` in every process, with its tensors and batches on `device`."""
        if self.size == 1:
            assert value is not None
            return value
        held = [tree_map(partial(_moved, device=HOST), value)]
        with _others():
            dist.broadcast_object_list(held, owner)
        moved: T = tree_map(partial(_moved, device=device), held[0])
        return moved

    def spread(self, costs: Sequence[float]) -> list[int]:
        """Return which process takes each task: the dearest tasks first, each to the least loaded process."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = loads.index(min(loads))
            loads[owners[task]] += costs[task]
        return owners


def process_count(variable: str = "WORLD_SIZE") -> int:
    """Return how many processes share the run, as `torchrun` says, or with another variable those of this machine.

    Raises:
        PruneForgeError: The variable holds no number.
    """
    text = os.environ.get(variable, "1")
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise PruneForgeError(f"the environment variable {variable} is {text!r}, and no number of processes; unset it")
    return int(text)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Yield the group that `torchrun` started this process in, or a group of one.

    Args:
        device: Where this process computes: gloo serves the CPU, nccl CUDA.

    Raises:
        UnfinishedError: The processes cannot be joined.
    """
    if process_count() == 1:
        yield Group()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects are exchanged through the current device
    started = not dist.is_initialized()
    if started:
        with _others(), _greetings_aside():
            if device.type == "cuda":
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    except BaseException:
        # Destroying an NCCL group takes all its processes, and the others are waiting for this one elsewhere.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None) if device.type == "cuda" else None
        if started:
            (abort or dist.destroy_process_group)()
        raise
    if started:
        dist.destroy_process_group()


@contextmanager
def _greetings_aside() -> Iterator[None]:
    """Send what C++ prints to standard output to standard error: gloo of torch 2.9 and 2.10 would precede our JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor | Batch) else value


@contextmanager
def _others() -> Iterator[None]:
    """Convert torch.distributed failures into `UnfinishedError`."""
    try:
        yield
    except torch.OutOfMemoryError:  # also a RuntimeError, but this process's own
        raise
    except (RuntimeError, ValueError, dist.DistBackendError) as error:  # values: of torchrun's variables
        reason = " ".join(str(error).split())[-160:]
        raise UnfinishedError(f"another process of the run ended or cannot be reached: {reason}") from error
