"""Let a recovery change what remains of a pruned block, under masks that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_map

from pruneforge.engine.chain import Chain
from pruneforge.engine.guard import named, seed_for, unchanged
from pruneforge.engine.hidden_states import Call
from pruneforge.engine.processes import Group
from pruneforge.engine.stream import BlockStatistics, Stream
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.recovery import Passing, Site
from pruneforge.interfaces.run import Run
from pruneforge.numerics import accumulation_dtype, all_finite, repeatable_gradients, zeroed

PART = 0x5EED
"""Position of recovery among the parts of a run, which gives it random numbers of its own."""


class PrunedBlock(Site):
    """The site of one block, in each of the processes that share the batches."""

    def __init__(
        self,
        run: Run,
        chain: Chain,
        index: int,
        stats: BlockStatistics,
        masks: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        owners: Mapping[str, int],
        stream: Stream | None,
        group: Group,
    ) -> None:
        """Describe the block; nothing is changed yet.

        Args:
            run: The run, which has a recovery.
            chain: The model, with the block on the device, pruned.
            index: The block.
            stats: Its statistics, by layer name.
            masks: Its masks [out, in], by layer name.
            dense: Its weights before pruning [out, in], by layer name.
            owners: Which process recovers each layer, by name; without layers that data did not reach.
            stream: The batches, with what `Stream` keeps where there are targets.
            group: The processes.
        """
        assert run.recovery is not None
        device = chain.residency.device
        self.block = chain.blocks[index]
        self.layers = [layer for layer in self.block.layers if owners.get(layer.name) == group.rank]
        self.stats = {name: of_layer.owned_by(run.recovery) for name, of_layer in stats.items()}
        self._masks = {name: mask.to(device) for name, mask in masks.items()}
        self.masks = {name: mask.clone() for name, mask in self._masks.items()}  # whatever the recovery does to them
        self.dense = dense
        self._run, self._recovery, self._chain, self._index = run, run.recovery, chain, index
        self.batch_count = sum(group.gather(len(stream.targets) if stream is not None else 0))
        self._owners, self._stream, self._group = owners, stream, group
        self._named = recoverable(chain.module, self.block, run.excluded)
        self._parameters = list(self._named.values())
        inside = {id(parameter) for parameter in self.block.module.parameters()}
        self._left_dense = [(layer, layer.weight.clone()) for layer in run.excluded if id(layer.parameter) in inside]
        self._generator = torch.Generator()

    def recover(self) -> frozenset[str]:
        """Run the recovery; return the names of the layers and of the other parameters that it changed.

        Raises:
            PruneForgeError: The recovery fails, moves a pruned weight, or leaves something that is not finite.
        """
        who = f"recovery {self._recovery.name!r}"
        before = [parameter.detach().clone() for parameter in self._parameters]
        error: Exception | None = None
        with self._wide():
            seed_for(self._run.seed, self.block.name, self._chain.residency.device, PART)
            self._generator.manual_seed(torch.initial_seed())
            try:
                seen = [(layer, self.stats[layer.name]) for layer in self.block.layers]
                with unchanged(who, seen, weights=False):
                    named(who, f"on block {self.block.name!r}", lambda: self._recovery.recover_block(self))
                self._check(who)
            except Exception as raised:
                if self.batch_count:  # the others wait for a batch; they hear of it when this process ends
                    raise
                error = raised  # `agree` raises it in all processes
            self._group.agree(error, {})
        self._share()
        changed: dict[int, str] = {}
        for (name, parameter), was in zip(self._named.items(), before, strict=True):
            if not all_finite(parameter):
                raise PruneForgeError(f"{who} made {name!r} too large for {parameter.dtype}, or not a number")
            if not torch.equal(parameter.detach(), was):
                changed[id(parameter)] = name
        layers = [layer.name for layer in self.block.layers if id(layer.parameter) in changed]
        return frozenset([*layers, *changed.values()])

    def parameters(self) -> list[nn.Parameter]:
        """Return what may be changed."""
        return list(self._parameters)

    def bias(self, layer: Layer) -> nn.Parameter | None:
        """Return the bias that is added to a layer's output, or `None`."""
        return self._named.get(f"{layer.name}.bias")

    def batches(self, shuffle: bool = False) -> Iterator[Passing]:
        """Yield every batch once; each comes from the process that has it."""
        if not self.batch_count:
            raise PruneForgeError(f"recovery {self._recovery.name!r} has no `targets`, so no batches are kept for it")
        order = torch.arange(self.batch_count)
        if shuffle:
            order = torch.randperm(self.batch_count, generator=self._generator)
        for number in order.tolist():
            yield _AtBlock(self._chain, self._index, *self._fetched(number))

    def _fetched(self, number: int) -> tuple[Batch, Tensor, Tensor, Call]:
        """Return a batch with its input, its target and the block's other arguments, all floats in the sums' dtype."""
        owner, place = number % self._group.size, number // self._group.size
        parts: tuple[Any, ...] | None = None
        if self._group.rank == owner:
            assert self._stream is not None
            in_flight = self._stream.batches[place]
            call = in_flight.calls[self._index]
            hidden, target = self._stream.inputs[place].get(), self._stream.targets[place].get()
            parts = (in_flight.batch, hidden, target, call.args, call.kwargs)
        device = self._chain.residency.device
        batch, hidden, target, args, kwargs = self._group.from_owner(parts, owner, device)
        return batch, self._widened(hidden), self._widened(target), Call(self._widened(args), self._widened(kwargs))

    @contextmanager
    def substituted(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the block with other weights within the context."""
        layers = {layer.name: layer for layer in self.block.layers}
        whole: dict[int, Tensor] = {}  # by parameter, which may hold the weights of several layers
        for name, weight in weights.items():
            parameter = layers[name].parameter
            values = whole.setdefault(id(parameter), parameter.clone())
            layers[name].view(values).copy_(weight)
        homes = [
            (module, name, parameter)
            for module in self.block.module.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in whole
        ]
        for module, name, parameter in homes:
            module._parameters[name] = whole[id(parameter)]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, parameter in homes:
                module._parameters[name] = parameter

    def step(self, optimizer: optim.Optimizer, loss: Tensor) -> None:
        """Take one step without moving pruned weights."""
        optimizer.zero_grad(set_to_none=True)
        with repeatable_gradients(self._chain.residency.device):
            loss.backward()
        with torch.no_grad():
            for layer in self.block.layers:
                if layer.parameter.grad is not None:  # momentum of a pruned weight would move it at a later step
                    zeroed(layer.view(layer.parameter.grad), self._masks[layer.name])
            optimizer.step()
            for layer in self.block.layers:
                zeroed(layer.matrix(), self._masks[layer.name])
            for layer, weight in self._left_dense:  # may be a slice of a parameter of which others are pruned
                layer.matrix().copy_(weight)

    @contextmanager
    def _wide(self) -> Iterator[None]:
        """Hold the block in float32 or better within the context, so that small steps are not rounded away."""
        buffers = [
            (module, name, value)
            for module in self.block.module.modules()
            for name, value in module._buffers.items()
            if value is not None and value.is_floating_point()
        ]
        homes = [(each, each.data, each.requires_grad, each.grad) for each in self.block.module.parameters()]
        try:
            for module, name, value in buffers:
                module._buffers[name] = self._widened(value)
            for parameter, data, _, _ in homes:
                parameter.requires_grad_(False)
                parameter.grad, parameter.data = None, self._widened(data)
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter, data, wanted, gradient in homes:
                with torch.no_grad():
                    data.copy_(parameter.data)
                parameter.grad = None
                parameter.data = data
                parameter.grad = gradient
                parameter.requires_grad_(wanted)
            for module, name, value in buffers:
                module._buffers[name] = value

    def _widened(self, values: Any) -> Any:
        def wide(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(accumulation_dtype(value.dtype))
            return value

        return tree_map(wide, values)

    def _check(self, who: str) -> None:
        """Raise if a pruned weight is not zero, or a layer that the user left dense has changed."""
        for layer, weight in self._left_dense:
            if not torch.equal(layer.matrix().to(weight.dtype), weight):
                raise PruneForgeError(f"{who} changed layer {layer.name!r}, which is excluded; use `site.parameters()`")
        for layer in self.block.layers:
            if layer.matrix().masked_fill(self._masks[layer.name], 0).count_nonzero():
                raise PruneForgeError(
                    f"{who} moved pruned weights of layer {layer.name!r}; write with `layer.write(mask, weight)`, and "
                    "train with `site.step`"
                )

    def _share(self) -> None:
        """Send each layer and its bias from the process that recovers it, and everything else from the first."""
        with torch.no_grad():
            for layer in self.block.layers:
                self._group.send_weight(layer, self._owners.get(layer.name, 0))
        biases = {f"{layer}.bias": owner for layer, owner in self._owners.items()}
        weights = {id(layer.parameter) for layer in self.block.layers}
        for name, parameter in self._named.items():
            if id(parameter) not in weights:
                self._group.send(parameter.data, biases.get(name, 0))


def recoverable(module: nn.Module, block: Block, excluded: Sequence[Layer]) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that a recovery may change, by full name.

    They are all of its own but for those of layers that stay dense, and those that something outside of it uses too.
    """
    held = {id(layer.parameter) for layer in block.layers}
    fixed = {id(layer.parameter) for layer in excluded} - held
    inside = f"{block.name}."
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            fixed.add(id(parameter))
    return {f"{inside}{name}": p for name, p in block.module.named_parameters() if id(p) not in fixed}


class _AtBlock(Passing):
    """A batch at a block that is held in float32 or better."""

    def __init__(self, chain: Chain, index: int, batch: Batch, hidden: Tensor, target: Tensor, call: Call) -> None:
        """Hold a batch's input of block `index`, what its output is compared with, and the other arguments."""
        self.batch = batch
        self.target = target
        self._chain, self._index = chain, index
        self._hidden = hidden
        self._call = call

    def output(self) -> Tensor:
        """Run the block as it is now."""
        with repeatable_gradients(self._chain.residency.device):
            return self._chain.call_block(self._index, self._hidden, self._call)
