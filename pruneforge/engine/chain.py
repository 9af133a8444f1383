"""A model as stem, chain of blocks and head, taken apart without knowing it.

The model's own forward pass does the work. Within it the blocks are replaced by stand-ins that note
what they are called with and hand the hidden states on unchanged, so embeddings, masks and positions
come from the model itself, for each block and batch, whatever the library's version calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.engine.hidden_states import Kept, Store
from pruneforge.engine.residency import Residency
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter, Block
from pruneforge.interfaces.batch import Batch


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Activations:
    """One batch on its way through the blocks.

    Attributes:
        batch: The batch, on the device.
        kept: Where the input of the next block is kept.
        calls: For each block, what it is called with besides.
    """

    batch: Batch
    kept: Kept
    calls: list[Call]

    @property
    def hidden(self) -> Tensor:
        """Input of the next block [samples, ..., hidden], on the device."""
        return self.kept.get()

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self.kept = self.kept.store.keep(value)


def with_hidden_states(batches: Sequence[Activations]) -> Iterator[tuple[Activations, Tensor]]:
    """Yield each batch and its input of the next block on the device, the next one fetched meanwhile."""
    if batches:
        store = batches[0].kept.store
        yield from zip(batches, store.each(batch.kept for batch in batches), strict=True)


StandIn = Callable[[int, Tensor, Call], Any]


class _StopForward(Exception):  # noqa: N818 - no error: it ends a forward pass whose rest nobody needs
    pass


class Chain:
    """Runs a model's stem, one block, or its head.

    Attributes:
        module: The model.
        adapter: Its adapter.
        blocks: Its blocks, in the order they run.
        residency: Brings parts of the model to the device.
        store: Keeps hidden states while they wait.
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: Adapter,
        blocks: Sequence[Block],
        residency: Residency,
        store: Store | None = None,
    ) -> None:
        self.module = module
        self.adapter = adapter
        self.blocks = blocks
        self.residency = residency
        self.store = store or Store(residency.device)
        self._transitions: set[int] = set()  # blocks after which the model has code of its own
        self._real_forward: Callable[..., Any]
        self._extras: tuple[Any, ...] | None = None  # what a block returns after its hidden states

    def capture(self, batches: Iterable[Batch]) -> list[Activations]:
        """Run the stem on every batch and return the first block's inputs and every block's calls.

        Raises:
            PruneForgeError: The model does not run its blocks one after another, each once.
        """
        activations: list[Activations] = []
        with torch.no_grad(), self.residency.stem_and_head():
            for batch in batches:
                captured = self._capture(batch.to(self.residency.device), learn=not activations)
                if activations:
                    captured.calls = _reuse(captured.calls, activations[-1].calls)
                activations.append(captured)
        return activations

    def _capture(self, batch: Batch, learn: bool) -> Activations:
        first: list[Tensor] = []
        calls: list[Call] = []

        passed: list[Tensor] = []

        def stand_in(index: int, hidden: Tensor, call: Call) -> Any:
            if index != len(calls):
                raise PruneForgeError(
                    f"block {self.blocks[index].name!r} ran out of turn; an adapter's blocks must form a chain"
                )
            if not calls:
                first.append(hidden)
                if learn:
                    self._learn_extras(hidden, call)
            if not isinstance(hidden, Tensor):
                raise PruneForgeError(
                    f"block {self.blocks[index].name!r} is called with {type(hidden).__name__} first, not with hidden "
                    "states; blocks must form a chain"
                )
            extras = [extra for extra in self._extras or () if isinstance(extra, Tensor)]
            if any(value is extra for value in (*call.args, *call.kwargs.values()) for extra in extras):
                raise PruneForgeError(
                    f"block {self.blocks[index].name!r} takes more from the block before than hidden states; "
                    "blocks must form a chain"
                )
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
                return Activations(batch, self.store.keep(first[0]), calls)
        raise PruneForgeError(f"the model never ran its last block {self.blocks[-1].name!r}")

    def _learn_extras(self, hidden: Tensor, call: Call) -> None:
        # Some libraries' blocks return a tensor, some a tuple; one real call of one block tells.
        block = self.blocks[0]
        with self.residency.visit(block):
            output = self._real_forward(hidden, *call.args, **call.kwargs)
        self._extras = None if isinstance(output, Tensor) else tuple(output[1:])

    def _as_output(self, hidden: Tensor) -> Any:
        return hidden if self._extras is None else (hidden, *self._extras)

    @contextmanager
    def _stand_ins(self, stand_in: StandIn) -> Iterator[None]:
        def forward(index: int) -> Callable[..., Any]:
            def replaced(*args: Any, **kwargs: Any) -> Any:
                if args:
                    return stand_in(index, args[0], Call(args[1:], kwargs))
                hidden = kwargs.pop("hidden_states")
                return stand_in(index, hidden, Call((), kwargs))

            return replaced

        # Other libraries patch `forward` on the instance too; theirs comes back afterwards.
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

    def run_block(self, index: int, hidden: Tensor, activations: Activations) -> Tensor:
        """Return what block `index` makes of `hidden`; the block must be on the device."""
        call = activations.calls[index]
        output = self.blocks[index].module(hidden, *call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def continues(self, index: int) -> bool:
        """Return whether the model has code of its own between block `index` and the next."""
        return index in self._transitions

    @contextmanager
    def between(self, index: int) -> Iterator[bool]:
        """Hold what the model has between block `index` and the next, and yield whether it has anything there."""
        if self.continues(index):
            with self.residency.stem_and_head():
                yield True
        else:
            yield False

    def transition(self, index: int, hidden: Tensor, activations: Activations) -> Tensor:
        """Return the next block's input for the output `hidden` of block `index`, differentiable.

        They are the same unless the model has code between its blocks (a stage's downsampling, say). That code
        is run in place: by the model's forward pass, with `hidden` standing in for what the block returns. Call it,
        and the backward pass through it, within `between(index)`.
        """
        if not self.continues(index):
            return hidden
        found: list[Tensor] = []

        def stand_in(position: int, passed: Tensor, call: Call) -> Any:
            if position == index + 1:
                found.append(passed)
                raise _StopForward
            return self._as_output(hidden if position == index else passed)

        with self._stand_ins(stand_in), suppress(_StopForward):
            self.adapter.forward(self.module, activations.batch)
        return found[0]

    def losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return each sample's mean loss [samples] for the last block's output `hidden`, differentiable.

        The stem and head must be on the device.
        """
        last = len(self.blocks) - 1

        def stand_in(index: int, passed: Tensor, call: Call) -> Any:
            return self._as_output(hidden if index == last else passed)

        with self._stand_ins(stand_in):
            return self.adapter.losses(self.adapter.forward(self.module, batch), batch)


def _reuse(calls: list[Call], earlier: list[Call]) -> list[Call]:
    """Return `calls` with tensors that equal those of an earlier batch replaced by them, to save memory."""
    known: dict[int, Any] = {}

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
