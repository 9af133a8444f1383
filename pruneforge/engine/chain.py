"""Run a model's stem, blocks or head separately, for any architecture.

The model's own forward pass is run with the blocks' `forward` replaced by stand-ins, which record their arguments and
return the hidden states unchanged. So embeddings, masks and positions come from the model itself, for each block and
batch, whatever the library's version calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.engine.guard import named
from pruneforge.engine.hidden_states import BatchInFlight, Call, HiddenStates
from pruneforge.engine.residency import Residency
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter, Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.objective import Objective

StandIn = Callable[[int, Any, Call], Any]
"""Takes a block's index, its hidden states as the model gives them, and its other arguments."""


class _StopForward(Exception):  # noqa: N818 - not an error
    """Stops a forward pass once the wanted inputs are captured."""


class Chain:
    """Runs a model's stem, one block, or its head.

    Attributes:
        module: The model.
        adapter: Its adapter.
        blocks: Its blocks, in the order they run.
        residency: Loads parts of the model onto the device.
        hidden_states: Stores them between blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: Adapter,
        blocks: Sequence[Block],
        residency: Residency,
        hidden_states: HiddenStates | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.module = module
        self.adapter = adapter
        self.blocks = blocks
        self.residency = residency
        self.hidden_states = hidden_states or HiddenStates(residency.device)
        self._objective = objective
        self._transitions: set[int] = set()  # blocks after which the model has code of its own
        self._real_forward: Callable[..., Any]
        self._extras: tuple[Any, ...] | None = None  # what a block returns after its hidden states

    def capture(self, batches: Iterable[Batch]) -> list[BatchInFlight]:
        """Run the stem on every batch; return the first block's inputs and every block's other arguments.

        Raises:
            PruneForgeError: The model does not run its blocks one after another, each once.
        """
        captured: list[BatchInFlight] = []
        with torch.no_grad(), self.residency.stem_and_head():
            for batch in batches:
                in_flight = self._capture(batch.to(self.residency.device), learn=not captured)
                if captured:
                    # Masks and positions are often equal in all batches; without this each batch holds its own.
                    in_flight.calls = _reuse(in_flight.calls, captured[-1].calls)
                captured.append(in_flight)
        return captured

    def _capture(self, batch: Batch, learn: bool) -> BatchInFlight:
        """Capture one batch; with `learn`, also run the first block once to see what it returns."""
        first: list[Tensor] = []
        calls: list[Call] = []
        passed: list[Tensor] = []

        def stand_in(index: int, hidden: Any, call: Call) -> Any:
            if index != len(calls):
                raise PruneForgeError(
                    f"block {self.blocks[index].name!r} ran out of order; an adapter's blocks must form a chain"
                )
            if not isinstance(hidden, Tensor):
                raise PruneForgeError(
                    f"block {self.blocks[index].name!r} is called with {type(hidden).__name__} first, not with hidden "
                    "states; blocks must form a chain"
                )
            if not calls:
                first.append(hidden)
                if learn:
                    self._learn_extras(hidden, call)
            extras = [extra for extra in self._extras or () if isinstance(extra, Tensor)]
            # A stand-in cannot compute further outputs; it returns those of `_learn_extras` as placeholders. A block
            # that uses one needs more than hidden states from the block before.
            if any(value is extra for value in (*call.args, *call.kwargs.values()) for extra in extras):
                raise PruneForgeError(
                    f"block {self.blocks[index].name!r} takes more from the block before than hidden states; "
                    "blocks must form a chain"
                )
            # Stand-ins return their input itself, so another tensor means that the model changed it in between.
            if calls and hidden is not passed[-1]:
                self._transitions.add(index - 1)
            calls.append(call)
            passed.append(hidden)
            if index == len(self.blocks) - 1:
                raise _StopForward
            return self._as_output(hidden)

        with self._stand_ins(stand_in):
            try:
                self.adapter.forward(self.module, batch)
            except _StopForward:
                return BatchInFlight(batch, self.hidden_states.keep(first[0]), calls)
        raise PruneForgeError(f"the model never ran its last block {self.blocks[-1].name!r}")

    def _learn_extras(self, hidden: Tensor, call: Call) -> None:
        """Run the first block once, to see whether blocks return a tensor or a tuple, which differs by library."""
        block = self.blocks[0]
        with self.residency.visit(block):
            output = self._real_forward(hidden, *call.args, **call.kwargs)
        self._extras = None if isinstance(output, Tensor) else tuple(output[1:])

    def _as_output(self, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a block returns them."""
        return hidden if self._extras is None else (hidden, *self._extras)

    @contextmanager
    def _stand_ins(self, stand_in: StandIn) -> Iterator[None]:
        """Replace every block's `forward` by `stand_in(index, hidden states, other arguments)` within the context."""

        def forward(index: int) -> Callable[..., Any]:
            def replaced(*args: Any, **kwargs: Any) -> Any:
                if args:
                    return stand_in(index, args[0], Call(args[1:], kwargs))
                return stand_in(index, kwargs.pop("hidden_states", None), Call((), kwargs))

            return replaced

        # Other libraries patch `forward` on the instance too; theirs is restored afterwards.
        patched = [block.module.__dict__.get("forward") for block in self.blocks]
        self._real_forward = self.blocks[0].module.forward
        try:
            for index, block in enumerate(self.blocks):
                block.module.__dict__["forward"] = forward(index)
            yield
        finally:
            for block, before in zip(self.blocks, patched, strict=True):
                del block.module.__dict__["forward"]
                if before is not None:
                    block.module.__dict__["forward"] = before

    def run_block(self, index: int, hidden: Tensor, in_flight: BatchInFlight) -> Tensor:
        """Return the output of block `index` for `hidden` [samples, ..., hidden]; the block must be on the device."""
        return self.call_block(index, hidden, in_flight.calls[index])

    def call_block(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Return the output of block `index` for `hidden` and other arguments, as `run_block` does."""
        output = self.blocks[index].module(hidden, *call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def continues(self, index: int) -> bool:
        """Return whether the model has code of its own, such as downsampling, between block `index` and the next."""
        return index in self._transitions

    @contextmanager
    def between(self, index: int) -> Iterator[bool]:
        """Load stem and head if the model has code between block `index` and the next; yield whether it has."""
        if self.continues(index):
            with self.residency.stem_and_head():
                yield True
        else:
            yield False

    def transition(self, index: int, hidden: Tensor, in_flight: BatchInFlight) -> Tensor:
        """Return the next block's input for the output `hidden` of block `index`, differentiable.

        The two are the same unless the model has code between the blocks. That code is run by the model's forward
        pass, in which block `index` is replaced by one that returns `hidden`. Call this, and the backward pass
        through it, within `between(index)`.
        """
        if not self.continues(index):
            return hidden
        following: list[Tensor] = []

        def stand_in(position: int, passed: Tensor, call: Call) -> Any:
            if position == index + 1:
                following.append(passed)
                raise _StopForward
            return self._as_output(hidden if position == index else passed)

        with self._stand_ins(stand_in), suppress(_StopForward):
            self.adapter.forward(self.module, in_flight.batch)
        return following[0]

    @property
    def whole_batches(self) -> bool:
        """Whether `losses` has to see all samples of a batch at once, since the objective compares them."""
        return self._objective is not None and self._objective.whole_batches

    def losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return each sample's loss [samples] for the last block's output `hidden`, differentiable.

        It is that of the run's objective, or else the adapter's. The stem and head must be on the device.

        Raises:
            PruneForgeError: The objective fails, or gives something else than one loss a sample.
        """
        last = len(self.blocks) - 1

        def stand_in(index: int, passed: Tensor, call: Call) -> Any:
            return self._as_output(hidden if index == last else passed)

        with self._stand_ins(stand_in):
            return model_losses(self.module, self.adapter, self._objective, batch)


def model_losses(module: nn.Module, adapter: Adapter, objective: Objective | None, batch: Batch) -> Tensor:
    """Run a model, and return each sample's loss [samples]: an objective's, or else the adapter's.

    Raises:
        PruneForgeError: The objective fails, or gives something else than one loss a sample.
    """
    output = adapter.forward(module, batch)
    if objective is None:
        return adapter.losses(output, batch)
    who = f"objective {objective.name!r}"
    losses = named(who, "on the model's output", lambda: objective.losses(output, batch))
    if not isinstance(losses, Tensor) or losses.shape != (batch.size,):
        made = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise PruneForgeError(f"{who} made {made} for {batch.size} samples; it must be one loss for each")
    return losses


def _reuse(calls: list[Call], earlier: list[Call]) -> list[Call]:
    """Return `calls`, with each tensor that equals an earlier batch's replaced by that one, to save memory."""
    known: dict[int, Any] = {}  # by id: blocks are often given the same tensors, which are compared once

    def same(value: Any, before: Any) -> Any:
        if isinstance(value, Tensor) and isinstance(before, Tensor):
            if id(value) not in known:
                alike = value.shape == before.shape and value.dtype == before.dtype
                known[id(value)] = before if alike and torch.equal(value, before) else value
            return known[id(value)]
        if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
            return tuple(same(v, b) for v, b in zip(value, before, strict=True))
        return value

    return [
        Call(
            same(call.args, before.args),
            {key: same(value, before.kwargs.get(key)) for key, value in call.kwargs.items()},
        )
        for call, before in zip(calls, earlier, strict=True)
    ]
