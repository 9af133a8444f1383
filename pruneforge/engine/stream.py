"""Sets of calibration batches on their way through the blocks, and the statistics they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pruneforge.engine.backward import BlockGradientRecorder
from pruneforge.engine.chain import Chain
from pruneforge.engine.gradient_store import GradientStore, Kind
from pruneforge.engine.hidden_states import BatchInFlight, Handle, with_hidden_states
from pruneforge.engine.processes import Group
from pruneforge.engine.recorder import InputRecorder, check_weights
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.recovery import Targets
from pruneforge.interfaces.statistics import (
    BlockGradientStatistic,
    InputStatistic,
    LayerStatistics,
    On,
    OutputStatistic,
    Requirement,
    Statistic,
    kind_of,
    of_model_gradients,
)
from pruneforge.profile import Profile

BlockStatistics = dict[str, LayerStatistics]
"""The statistics of the layers of one block, by layer name."""

Collected = dict[str, tuple[dict[type[Statistic], Statistic], dict[Any, Any]]]
"""The statistics of each layer of a block, by class, and the values shared by layers of the same input."""


@dataclass(frozen=True)
class Flow:
    """How batches go through the blocks.

    Attributes:
        chain: The model.
        group: The processes that share the batches.
        profile: Times the stages.
        dense: Whether each block's inputs come from dense blocks before it.
        targets: What the blocks' outputs are kept of, for recovery: "dense" for those of the dense model, "pruned" for
            those of the dense block on the inputs that the pruned blocks before it give.
    """

    chain: Chain
    group: Group
    profile: Profile
    dense: bool
    targets: Targets | None = None


class Stream:
    """One set of batches.

    Attributes:
        batches: The batches, at the next block's input.
        model_gradients: The required statistics of gradients of the model's loss.
        records_inputs: Whether inputs or outputs of layers are recorded.
        inputs: Of the block that was calibrated last, where there are targets: its inputs, batch by batch.
        targets: And what its outputs are compared with.
    """

    def __init__(self, batches: Sequence[BatchInFlight], kinds: Sequence[type[Statistic]], flow: Flow) -> None:
        """Begin at the first block.

        Args:
            batches: The captured batches; those of the caller stay at the first block.
            kinds: The statistics to collect.
            flow: How they go.
        """
        self._flow = flow
        self._input_kinds = [kind for kind in kinds if issubclass(kind, InputStatistic)]
        self._output_kinds = [kind for kind in kinds if issubclass(kind, OutputStatistic)]
        self._block_gradients = [kind for kind in kinds if issubclass(kind, BlockGradientStatistic)]
        self.model_gradients: list[Kind] = [kind for kind in kinds if of_model_gradients(kind)]
        self.records_inputs = bool(self._input_kinds or self._output_kinds)
        passes = self.records_inputs or bool(self._block_gradients) or flow.targets is not None
        self.batches = [replace(in_flight) for in_flight in batches] if passes else []
        self.inputs: list[Handle] = []
        self.targets: list[Handle] = []
        compares = flow.targets == "dense" or any(kind.with_target for kind in self._block_gradients)
        # The same batches in the dense model, beside those that pass pruned blocks.
        self._beside = [each.handle for each in self.batches] if compares and not flow.dense else []

    @torch.no_grad()
    def calibrate(self, index: int, through: int | None) -> Collected:
        """Run every batch through a dense block and return what it leaves; see `Streams.calibrate`."""
        flow, block = self._flow, self._flow.chain.blocks[index]
        recorder = InputRecorder(
            block, self._input_kinds, self._output_kinds, stop=not flow.dense and flow.targets != "pruned"
        )
        gradients = BlockGradientRecorder(block, self._block_gradients)
        self.inputs, self.targets = [], []
        for number, (in_flight, hidden) in enumerate(with_hidden_states(self.batches)):
            if through is not None:
                with flow.profile.stage("propagate", through):
                    hidden = in_flight.hidden = flow.chain.run_block(through, hidden, in_flight)
            if not (block.layers or flow.dense or self._beside):
                continue  # all layers are excluded, and the outputs will come from the pruned block
            with flow.profile.stage("calibrate", index):
                self._calibrate_batch(index, number, hidden, recorder, gradients)
        recorder.merge(flow.group)
        gradients.merge(flow.group, flow.chain.residency.device)
        collected: Collected = {}
        for layer in block.layers:
            statistics, shared = recorder.statistics(layer)
            statistics.update(gradients.statistics[layer.name].items())
            collected[layer.name] = statistics, shared
        return collected

    def _calibrate_batch(
        self, index: int, number: int, hidden: Tensor, recorder: InputRecorder, gradients: BlockGradientRecorder
    ) -> None:
        """Run one batch through a dense block, and through the dense model beside it."""
        flow, in_flight = self._flow, self.batches[number]
        layers, given = flow.chain.blocks[index].layers, in_flight.handle
        output = target = None
        if self._beside:
            target = self._pass_beside(index, number)
        if flow.dense or (layers and (self.records_inputs or flow.targets == "pruned")):
            with recorder.recording(in_flight.batch):
                output = flow.chain.run_block(index, hidden, in_flight)
        if layers:
            gradients.record(flow.chain, index, hidden, in_flight, output if flow.dense else target)
        if flow.dense:
            assert output is not None
            in_flight.hidden = output
        if layers and flow.targets is not None:
            self.inputs.append(given)
            if flow.dense:
                self.targets.append(in_flight.handle)
            elif flow.targets == "dense":
                self.targets.append(self._beside[number])
            else:
                assert output is not None
                self.targets.append(flow.chain.hidden_states.keep(output))

    def _pass_beside(self, index: int, number: int) -> Tensor:
        """Return a batch's output of a block in the dense model, which is its next block's input there."""
        chain = self._flow.chain
        output = chain.run_block(index, self._beside[number].get(), self.batches[number])
        self._beside[number] = chain.hidden_states.keep(output)
        return output

    def forget(self) -> None:
        """Drop what was kept for the recovery of the block that was calibrated last."""
        self.inputs, self.targets = [], []

    @property
    def beside(self) -> bool:
        """Whether the batches also pass the dense model."""
        return bool(self._beside)

    @torch.no_grad()
    def pass_beside(self, index: int) -> None:
        """Run every batch of the dense model through a dense block."""
        for number in range(len(self._beside)):
            self._pass_beside(index, number)

    @torch.no_grad()
    def propagate(self, index: int) -> None:
        """Run every batch through a pruned block, for the next block's inputs."""
        for in_flight, hidden in with_hidden_states(self.batches):
            with self._flow.profile.stage("propagate", index):
                in_flight.hidden = self._flow.chain.run_block(index, hidden, in_flight)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Turn a block's outputs into the next block's inputs where the model has code between the two."""
        chain = self._flow.chain
        for in_flight, hidden in with_hidden_states(self.batches):
            in_flight.hidden = chain.transition(index, hidden, in_flight)
        for number, handle in enumerate(self._beside):
            after = chain.transition(index, handle.get(), self.batches[number])
            self._beside[number] = chain.hidden_states.keep(after)


class Streams:
    """All sets of batches of a pass, by name."""

    def __init__(
        self, captured: Mapping[str, Sequence[BatchInFlight]], requires: Sequence[Requirement], flow: Flow
    ) -> None:
        """Begin at the first block.

        Args:
            captured: The captured batches of each set; the first is the one that requirements without a name mean, and
                the one that recovery learns from.
            requires: The statistics to collect.
            flow: How the batches go.
        """
        self._flow = flow
        self._requires = requires
        self.first = next(iter(captured), "")
        self._streams: dict[str, Stream] = {}
        for name, batches in captured.items():
            own = flow if name == self.first else replace(flow, targets=None)
            kinds = [kind_of(each) for each in requires if self._stream_of(each) == name]
            self._streams[name] = Stream(batches, list(dict.fromkeys(kinds)), own)

    def _stream_of(self, required: Requirement) -> str:
        return required.stream if isinstance(required, On) else self.first

    def __bool__(self) -> bool:
        """Return whether any batch has to pass the blocks."""
        return any(stream.batches for stream in self._streams.values())

    @property
    def main(self) -> Stream | None:
        """The first set, which recovery learns from; `None` where no data are needed."""
        return self._streams.get(self.first)

    @property
    def beside(self) -> bool:
        """Whether batches also pass the dense model."""
        return any(stream.beside for stream in self._streams.values())

    def model_gradients(self) -> dict[str, list[Kind]]:
        """Return the required statistics of gradients of the model's loss, by set."""
        return {name: stream.model_gradients for name, stream in self._streams.items() if stream.model_gradients}

    def calibrate(self, index: int, through: int | None = None) -> BlockStatistics:
        """Run every batch through a dense block and return its layers' statistics, without the model's gradients.

        Args:
            index: The block.
            through: The pruned block before, if batches still have to pass it.
        """
        block = self._flow.chain.blocks[index]
        check_weights(block)
        collected = {name: stream.calibrate(index, through) for name, stream in self._streams.items()}
        self._flow.profile.settle("calibrate", index)
        found: BlockStatistics = {}
        for layer in block.layers:
            of_layer = {name: by_layer[layer.name] for name, by_layer in collected.items()}
            statistics = {
                each: of_layer[self._stream_of(each)][0][kind_of(each)]
                for each in self._requires
                if kind_of(each) in of_layer.get(self._stream_of(each), ({}, {}))[0]
            }
            # Layers of one input share it in every set, so any set that recorded inputs tells.
            shared = next((of_layer[name][1] for name, stream in self._streams.items() if stream.records_inputs), {})
            found[layer.name] = LayerStatistics(statistics, shared)
        return found

    def with_model_gradients(
        self, block: Block, found: BlockStatistics, stores: Mapping[str, GradientStore]
    ) -> BlockStatistics:
        """Return a block's statistics joined with those of the model's gradients, which are read from the stores."""
        for name, kinds in self.model_gradients().items():
            by_layer = stores[name].get(block, kinds, self._flow.chain.residency.device)
            wanted = [each for each in self._requires if self._stream_of(each) == name]
            found = {
                layer: stats.joined(
                    {each: by_layer[layer][kind] for each in wanted for kind in kinds if kind is kind_of(each)}
                )
                for layer, stats in found.items()
            }
        return found

    def pass_beside(self, index: int) -> None:
        """Run the batches in the dense model through a dense block."""
        for stream in self._streams.values():
            stream.pass_beside(index)

    def propagate(self, index: int) -> None:
        """Run every batch through a pruned block, for the next block's inputs."""
        for stream in self._streams.values():
            stream.propagate(index)
        self._flow.profile.settle("propagate", index)

    def advance(self, index: int) -> None:
        """Turn a block's outputs into the next block's inputs where the model has code between the two."""
        if self and self._flow.chain.continues(index):
            with self._flow.profile.stage("propagate", index), self._flow.chain.between(index):
                for stream in self._streams.values():
                    stream.advance(index)
