"""Collect statistics of inputs and outputs during a block's forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pruneforge.engine.processes import Group
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.statistics import InputStatistic, OutputStatistic, Statistic, empty_statistics
from pruneforge.numerics import all_finite, finite_flag, first_false


class _Input:
    """One input of a block's layers: its statistics, and the values that metrics derived from them.

    Attributes:
        leader: The layer that updates the statistics, the first one that received this input.
    """

    def __init__(self, leader: Layer, kinds: Sequence[type[InputStatistic]]) -> None:
        self.leader = leader
        self.statistics = empty_statistics(leader, kinds)
        self.shared: dict[Any, Any] = {}


class _Enough(Exception):  # noqa: N818 - not an error
    """Stops a forward pass once every layer has received its input."""


class InputRecorder:
    """Updates one set of statistics for each *input* of a block while the block runs.

    Layers that receive the very same tensor (q, k, v; gate and up) share an input. The first batch shows which do;
    from then on the first layer of each input records for all of them.
    """

    def __init__(
        self,
        block: Block,
        kinds: Sequence[type[InputStatistic]],
        output_kinds: Sequence[type[OutputStatistic]] = (),
        stop: bool = False,
    ) -> None:
        """Start empty.

        Args:
            block: The block.
            kinds: The statistics of inputs to update.
            output_kinds: The statistics of outputs to update.
            stop: Stop each pass at the last layer's input, before its product; no output is needed then. Passes stop
                early only if the first one calls every layer exactly once.
        """
        self._block = block
        self._kinds = kinds
        self._output_kinds = output_kinds
        self._outputs: dict[str, dict[type[OutputStatistic], OutputStatistic]] = {}
        self._inputs: dict[str, _Input] = {}
        self._batch: Batch | None = None
        self._samples = 0  # in all batches so far
        self._seen: dict[int, tuple[Tensor, int, _Input]] = {}
        self._uses: list[str] = []
        self._stop = stop and not output_kinds
        self._each_once: bool | None = None  # whether every layer is called exactly once; unknown until the first pass

    @contextmanager
    def recording(self, batch: Batch) -> Iterator[None]:
        """Record the layers' inputs while one batch passes the block within the context."""
        if not self._kinds and not self._output_kinds:
            yield
            return
        self._batch, self._seen, self._uses = batch, {}, []
        after = self._record_output if self._output_kinds else None
        with suppress(_Enough), WeightUses(self._block.layers, before=self._record, after=after):
            yield
        self._samples += batch.size
        # A layer that is called twice in a pass would miss its second input if the pass stopped early.
        if self._each_once is None:
            names = [layer.name for layer in self._block.layers]
            self._each_once = self._stop and sorted(self._uses) == sorted(names)

    def _record(self, layer: Layer, value: Tensor) -> None:
        """Note that `layer` received `value`, and update statistics if it is the input's leader."""
        known = self._inputs.get(layer.name)
        if known is None:
            same = self._seen.get(id(value))
            # `_version` counts changes in place: a tensor changed between two layers is two inputs.
            known = same[2] if same and same[1] == value._version else _Input(layer, self._kinds)
            self._inputs[layer.name] = known
        # Holding the tensor keeps its id from being reused by another one within this batch.
        self._seen.setdefault(id(value), (value, value._version, known))
        if known.leader is layer:
            assert self._batch is not None
            _update(known.statistics.values(), layer.inputs(value, self._batch.size), self._batch, layer)
        self._uses.append(layer.name)
        if self._each_once and len(set(self._uses)) == len(self._block.layers):
            raise _Enough

    def _record_output(self, layer: Layer, value: Tensor, output: Tensor) -> None:
        """Update the statistics of what `layer` puts out."""
        batch = self._batch
        assert batch is not None
        if layer.name not in self._outputs:
            self._outputs[layer.name] = empty_statistics(layer, self._output_kinds)
        _update(self._outputs[layer.name].values(), layer.outputs(output, batch.size), batch, layer)

    def merge(self, group: Group) -> None:
        """Merge the statistics of all processes into those of all batches."""
        self._complete(group)
        done: set[int] = set()
        for layer in self._block.layers:
            known = self._inputs.get(layer.name)
            of_layer: list[Statistic] = list(self._outputs.get(layer.name, {}).values())
            if known is not None and id(known) not in done:
                done.add(id(known))
                of_layer += known.statistics.values()
            for statistic in of_layer:
                group.merge(statistic, layer.parameter.device)

    def _complete(self, group: Group) -> None:
        """Make statistics of routed layers empty where no token came, and count the samples that sent none.

        Raises:
            PruneForgeError: No token came to any of them, as where one kernel runs all experts.
        """
        layers = {layer.name: layer for layer in self._block.layers}
        routed = [layer.name for layer in self._block.layers if layer.routed]
        if not routed or not (self._kinds or self._output_kinds):
            return
        for name in routed:
            of_layer = self._outputs.setdefault(name, empty_statistics(layers[name], self._output_kinds))
            for of_output in of_layer.values():
                of_output.samples = self._samples
        leaders: dict[str, str] = {}  # of all processes, which have to merge the same statistics in the same order
        for of_process in group.gather({name: known.leader.name for name, known in self._inputs.items()}):
            leaders |= of_process
        if not leaders.keys() & set(routed):
            raise PruneForgeError(
                f"no calibration batch reached any routed layer of block {self._block.name!r}, such as {routed[0]!r}; "
                "the model must multiply by one expert's weight at a time, or exclude these layers"
            )
        for name in routed:
            if name not in self._inputs:
                leader = leaders.get(name, name)
                self._inputs.setdefault(leader, _Input(layers[leader], self._kinds))
                self._inputs[name] = self._inputs[leader]
            for statistic in self._inputs[name].statistics.values():
                statistic.samples = self._samples

    def statistics(self, layer: Layer) -> tuple[dict[type[Statistic], Statistic], dict[Any, Any]]:
        """Return the statistics of `layer`, and the values shared with layers of the same input.

        Raises:
            PruneForgeError: No batch reached the layer, or a non-finite value did.
        """
        if not self._kinds and not self._output_kinds:
            return {}, {}
        if layer.name not in self._inputs:
            raise PruneForgeError(f"no calibration batch reached layer {layer.name!r}")
        known = self._inputs[layer.name]
        found: dict[type[Statistic], Statistic] = dict(known.statistics.items())
        found.update(self._outputs.get(layer.name, {}).items())
        for statistic in found.values():
            if not all_finite(statistic.total):
                raise PruneForgeError(
                    f"non-finite activations reach layer {layer.name!r}; {mend_non_finite(self._batch)}"
                )
        return found, known.shared


def mend_non_finite(batch: Batch | None) -> str:
    """Return what a user can do about non-finite activations in `batch`."""
    if batch is not None and batch.valid is not None:
        return (
            "batches are padded, and eager attention gives NaN in float64 where a row is masked whole, at padding on "
            "the left: pad on the right, load the model with attn_implementation='sdpa', or use float32"
        )
    return "check the model's weights and the calibration data, or run with `dtype` float32"


def check_weights(block: Block) -> None:
    """Raise if a layer of a visited block has non-finite weights.

    Raises:
        PruneForgeError: Naming the first such layer.
    """
    if not block.layers:
        return
    first = first_false([finite_flag(layer.matrix()) for layer in block.layers])
    if first is not None:
        raise PruneForgeError(f"layer {block.layers[first].name!r} has non-finite weights; the checkpoint is damaged")


def _update(statistics: Iterable[InputStatistic | OutputStatistic], seen: Tensor, batch: Batch, layer: Layer) -> None:
    """Add what a layer received or put out, [samples, tokens, in or out], to statistics of it.

    Raises:
        PruneForgeError: The tokens that count, or the samples, cannot be told apart.
    """
    tokens = valid_tokens(seen, batch, layer)
    for statistic in statistics:
        if not statistic.by_sample:
            statistic.update(tokens, batch.size)
            continue
        if layer.routed:
            raise PruneForgeError(
                f"statistic {type(statistic).__name__} is of one sample at a time, and layer {layer.name!r} receives "
                "the tokens that are routed to it, of all samples; leave it out with `exclude`"
            )
        for part in tokens.split(seen.shape[1] if batch.valid is None else batch.lengths):
            statistic.update(part, 1)


def valid_tokens(inputs: Tensor, batch: Batch, layer: Layer) -> Tensor:
    """Return the tokens of `inputs` [samples, tokens, in] that are not padding, as [tokens, in].

    Raises:
        PruneForgeError: The batch is padded, and the layer receives other tokens than the batch has.
    """
    if batch.valid is None:
        return inputs.reshape(-1, inputs.shape[-1])
    if layer.routed:
        raise PruneForgeError(
            f"layer {layer.name!r} receives the tokens that are routed to it, so padding cannot be left out; "
            "calibrate with batches of equal lengths"
        )
    if inputs.shape[:2] != batch.valid.shape:
        raise PruneForgeError(
            f"layer {layer.name!r} sees {tuple(inputs.shape[:2])} tokens where the batch has "
            f"{tuple(batch.valid.shape)}, so padding cannot be left out; calibrate with batches of equal lengths"
        )
    return inputs.flatten(0, 1).index_select(0, batch.places)


class WeightUses(TorchFunctionMode):
    """Calls back, within its context, at every product of an input with the weight of one of some layers.

    Each layer says which functions these are. Weights are recognised by their place in memory where the product
    happens. Module hooks would miss code that takes a module's weight and calls the function itself, as BEiT and EVA
    do, and code that multiplies by a slice of a parameter.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        before: Callable[[Layer, Tensor], None] | None = None,
        after: Callable[[Layer, Tensor, Tensor], None] | None = None,
    ) -> None:
        """Call `before(layer, input)` and `after(layer, input, output)` around each product."""
        super().__init__()
        self._layers = {_place(layer.matrix(), layer.parameter): layer for layer in layers}
        self._products = {product.function: product for layer in layers for product in layer.products}
        self._before = before
        self._after = after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = self._products.get(func)
        if product is None:
            return func(*args, **kwargs)
        value, weight = product.operands(args, kwargs)
        layer = self._layers.get(_place(weight.mT if product.transposed and weight.dim() > 1 else weight, weight))
        if layer is not None and self._before:
            self._before(layer, value)
        output = func(*args, **kwargs)
        if layer is not None and self._after:
            self._after(layer, value, output)
        return output


def _place(weight: Tensor, holder: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return what tells a weight [out, in, ...] apart: where it lies in memory, and how.

    Where torch does not know the memory, as for some subclasses of tensors, the tensor that holds it stands for it.
    """
    return weight.data_ptr() or id(holder), weight.shape[:2], weight.stride()[:2]
