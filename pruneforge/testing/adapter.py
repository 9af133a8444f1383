"""What every adapter promises, checked on the tiny models that it brings."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneforge.engine.chain import Chain
from pruneforge.engine.residency import InMemory
from pruneforge.interfaces.adapter import Adapter, Example
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.metric import Metric
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.statistics import LayerStatistics
from pruneforge.interfaces.summaries import ColumnSquares
from pruneforge.testing.kit import Kit, by_name, where_present
from pruneforge.testing.models import fresh, layers_of, prune_with, readable


@dataclass(frozen=True)
class Case:
    """An adapter with one of its examples, or with `None` if it has none."""

    adapter: Adapter
    example: Example | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.adapter.name if self.example is None else f"{self.adapter.name} on {self.example.name}"

    def fresh(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Batch]]:
        """Return a copy of the example's model, and its batches as the adapter prepares them."""
        assert self.example is not None
        module, data = fresh(self.example, dtype)
        return module, [self.adapter.batch(given, module) for given in data]

    def pruned(self) -> tuple[nn.Module, _Watching]:
        """Return the example's model in float32 after pruning half of it, and the metric that has seen its layers."""
        assert self.example is not None
        (module, data), metric = fresh(self.example, torch.float32), _Watching()
        prune_with(self.adapter, module, metric, sparsity=0.5, calibration=data)
        return module, metric


class _Watching(Metric):
    """Weights by the norms of their inputs; notes how many samples and tokens each layer has received."""

    requires = (ColumnSquares,)

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, tuple[int, int]] = {}

    def score(self, layer: Layer, stats: LayerStatistics) -> Tensor:
        """Return the score [out, in]."""
        seen = stats[ColumnSquares]
        self.received[layer.name] = seen.samples, seen.tokens
        return layer.weight.abs() * seen.per_sample().sqrt()


class _Output(Objective):
    """Keeps the model's output."""

    output: Any = None

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Keep the output, and return zeros [samples]."""
        self.output = output
        return torch.zeros(batch.size)


def cases(adapter: Adapter) -> Sequence[Case]:
    """Return the adapter with each of its examples."""
    return [Case(adapter, example) for example in adapter.examples()] or [Case(adapter, None)]


def it_brings_examples(case: Case) -> None:
    """Check that there are examples, that they are the adapter's own, and the same each time."""
    assert case.example is not None, (
        "it has no examples, and nothing else can be checked; override `examples()` so that it returns tiny random "
        "models with data, each a pruneforge.Example"
    )
    declined = case.adapter.declines_module(case.example.module)
    assert declined is None, f"the adapter declines its own example: {declined}"
    _, batches = case.fresh()
    sizes = [batch.size for batch in batches]
    assert min([len(sizes), *sizes]) > 1, f"its batches have the sizes {sizes}; two of two samples are the least"
    again = next(each for each in case.adapter.examples() if each.name == case.example.name)
    for (name, one), two in zip(case.example.module.named_parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, two), f"{name} is another one when `examples` is called again; seed it"


def other_models_are_declined(case: Case) -> None:
    """Check that a folder and a module of something else are declined, each in one line."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
        for what, said in (
            ("a folder with an empty config.json", case.adapter.declines(folder)),
            ("a torch.nn.Linear", case.adapter.declines_module(nn.Linear(2, 2))),
        ):
            assert said, f"it does not decline {what}"
            assert "\n" not in said.strip(), f"it declines {what} in several lines: {said!r}"


def blocks_have_layers_of_the_model_s_parameters(case: Case) -> None:
    """Check that there are two blocks or more, and that layers are views of their parameters and called like them."""
    module, _ = case.fresh()
    blocks, modules = case.adapter.blocks(module), dict(module.named_modules())
    assert len(blocks) > 1, f"the model has {len(blocks)} blocks; an example needs two"
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for block in blocks:
        assert modules.get(block.name) is block.module, f"the model has no module {block.name!r} that is this block"
        assert block.layers, f"block {block.name} has no layers"
        inside = {id(parameter) for parameter in block.module.parameters()}
        for layer in block.layers:
            assert id(layer.parameter) in inside, f"the parameter of {layer.name} is not one of block {block.name}"
            known = names[id(layer.parameter)]
            fits = known == f"{layer.name}.weight" or layer.name.startswith(known)
            assert fits, f"layer {layer.name} is parameter {known}; call it {known.removesuffix('.weight')}"
            whole, view = layer.parameter.untyped_storage(), layer.matrix().untyped_storage()
            assert whole.data_ptr() == view.data_ptr(), f"`matrix` of {layer.name} is a copy, not a view"


def each_weight_is_one_layer(case: Case) -> None:
    """Check that no layer comes twice, by its name or by its weight, and that none is tied to another parameter."""
    module, _ = case.fresh()
    layers = layers_of(case.adapter, module)
    for name, count in Counter(layer.name for layer in layers).items():
        assert count == 1, f"{count} layers are called {name}"
    for place, count in Counter(layer.matrix().data_ptr() for layer in layers).items():
        same = [layer.name for layer in layers if layer.matrix().data_ptr() == place]
        assert count == 1, f"layers {' and '.join(same)} are the same weight"
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for layer in layers:
        assert uses[id(layer.parameter)] == 1, f"the weight of {layer.name} is tied to another parameter"


@torch.no_grad()
def blocks_form_a_chain(case: Case) -> None:
    """Check that stem, blocks and head, one after another, give the model's own output, but for padding."""
    module, batches = case.fresh()
    blocks, seen = case.adapter.blocks(module), _Output()
    chain = Chain(module, case.adapter, blocks, InMemory(module, blocks, torch.device("cpu")), objective=seen)
    for in_flight in chain.capture(batches):
        hidden = in_flight.hidden
        for index in range(len(blocks)):
            hidden = chain.run_block(index, hidden, in_flight)
            if index < len(blocks) - 1:
                hidden = chain.transition(index, hidden, in_flight)
        chain.losses(hidden, in_flight.batch)
        found, expected = (
            readable(output, in_flight.batch) for output in (seen.output, case.adapter.forward(module, in_flight.batch))
        )
        assert expected, "the model's output holds no tensor"
        for one, two in zip(found, expected, strict=True):
            assert torch.allclose(one, two, rtol=1e-9, atol=1e-9), "run block by block, the model gives another output"


def layers_receive_their_inputs(case: Case) -> None:
    """Check that each layer is pruned by the inputs of all samples, or if it is routed by some."""
    module, metric = case.pruned()
    _, batches = case.fresh()
    samples = sum(batch.size for batch in batches)
    for layer in layers_of(case.adapter, module):
        seen = metric.received.get(layer.name)
        assert seen is not None, f"layer {layer.name} has received no input"
        assert layer.routed or seen[0] == samples, f"layer {layer.name} has seen {seen[0]} of {samples} samples"


def pruning_changes_layers_alone(case: Case) -> None:
    """Check that stem, head and whatever is no layer stay as they are, buffers included."""
    assert case.example is not None
    module, _ = case.pruned()
    weights = {layer.parameter.data_ptr() for layer in layers_of(case.adapter, module)}
    original = case.example.module.state_dict()
    for name, value in module.state_dict().items():
        if value.data_ptr() not in weights:
            assert torch.equal(value, original[name]), f"{name} is no layer's weight, and pruning changes it"


def losses_are_each_sample_s_own(case: Case) -> None:
    """Check that there is one loss a sample, differentiable, the same alone and in a batch."""
    module, batches = case.fresh()
    for batch in batches:
        losses = case.adapter.losses(case.adapter.forward(module, batch), batch)
        assert losses.shape == (batch.size,), f"{batch.size} samples have losses {list(losses.shape)}"
        assert losses.requires_grad, "losses are not differentiable"
        losses.sum().backward()
        for layer in layers_of(case.adapter, module):
            grad = layer.parameter.grad
            assert grad is not None, f"the losses have no gradient of {layer.name}"
            assert grad.isfinite().all(), f"the gradient of {layer.name} is not finite"
        for index in range(batch.size):
            part = batch.part(slice(index, index + 1))
            with torch.no_grad():
                alone = case.adapter.losses(case.adapter.forward(module, part), part)
            same = torch.allclose(alone, losses[index : index + 1].detach(), rtol=1e-6, atol=1e-9)
            assert same, f"the loss of a sample is {alone.item():.6g} alone and {losses[index].item():.6g} in a batch"


@torch.no_grad()
def saved_models_load_as_they_were(case: Case) -> None:
    """Check that a pruned model, written and read, gives the same output to the bit and keeps its zeros."""
    assert case.example is not None
    module, _ = case.pruned()
    _, batches = case.fresh(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        case.adapter.save(module, case.example.processor, Path(folder))
        declined = case.adapter.declines(folder)
        assert declined is None, f"the adapter declines the folder that it has written: {declined}"
        loaded, _ = case.adapter.load(folder, None)
    for one, two in zip(layers_of(case.adapter, module), layers_of(case.adapter, loaded), strict=True):
        assert torch.equal(one.matrix() == 0, two.matrix() == 0), f"the zeros of {one.name} are lost when it is saved"
    for batch in batches:
        outputs = (readable(case.adapter.forward(each, batch), batch) for each in (module, loaded))
        for saved, read in zip(*outputs, strict=True):
            assert torch.equal(saved, read), "a model that was saved and loaded gives another output"


def streamed_models_are_pruned_alike(case: Case) -> None:
    """Check, where a skeleton is offered, that pruning from disk gives the masks and weights of pruning in memory."""
    assert case.example is not None
    module, data = fresh(case.example, torch.float32)
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "dense", Path(place) / "pruned"
        folder.mkdir()
        case.adapter.save(copy.deepcopy(module), case.example.processor, folder)
        if case.adapter.skeleton(str(folder), None) is None:
            return
        streamed = prune_with(case.adapter, folder, _Watching(), sparsity=0.5, calibration=data, output=output)
        loaded, _ = case.adapter.load(str(output), None)
        masks = {name: mask.clone() for name, mask in streamed.masks.items()}
    whole = prune_with(case.adapter, module, _Watching(), sparsity=0.5, calibration=data)
    for one, two in zip(layers_of(case.adapter, module), layers_of(case.adapter, loaded), strict=True):
        same = torch.equal(whole.masks[one.name], masks[one.name])
        assert same, f"the mask of {one.name} is another one when the model is streamed"
        assert torch.equal(one.matrix(), two.matrix()), f"{one.name} is another one when the model is streamed"


def sizes_are_whole_numbers(case: Case) -> None:
    """Check what is said of the context, the logits and the heads, by which memory is planned."""
    module, _ = case.fresh()
    for what, value in (
        ("context_length", case.adapter.context_length(module)),
        ("logits_a_token", case.adapter.logits_a_token(module)),
        ("attention_heads", case.adapter.attention_heads(module)),
    ):
        allowed = (isinstance(value, int) and value >= 0) or (what == "context_length" and value is None)
        assert allowed, f"`{what}` gives {value!r}"


KIT = Kit(
    by_name(
        it_brings_examples,
        other_models_are_declined,
        *where_present(
            "example",
            blocks_have_layers_of_the_model_s_parameters,
            each_weight_is_one_layer,
            blocks_form_a_chain,
            layers_receive_their_inputs,
            pruning_changes_layers_alone,
            losses_are_each_sample_s_own,
            saved_models_load_as_they_were,
            streamed_models_are_pruned_alike,
            sizes_are_whole_numbers,
        ),
    ),
    cases,
    Case,
)
