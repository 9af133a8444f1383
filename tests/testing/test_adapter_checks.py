"""Adapters keep their promises, and each check catches one that breaks its promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from pruneforge import Block, Layer, create
from pruneforge.plugins import loaded_plugins
from pruneforge.testing import check_adapter, parametrize_with_checks, run_checks

FIRST_PARTY = [create("adapter", entry.name) for entry in loaded_plugins().registry.entries("adapter")]


@parametrize_with_checks(FIRST_PARTY)
def test_first_party_adapters_keep_their_promises(check):
    assert check.run() is None  # it raises otherwise


def test_each_first_party_adapter_brings_examples():
    assert all(adapter.examples() for adapter in FIRST_PARTY)


Llama = type(create("adapter", "llama"))


class Broken(Llama):
    """The adapter of LLaMA with one example; a subclass breaks one promise."""

    def examples(self):
        return super().examples()[:1]


class Restless(Broken):
    def examples(self):
        (example,) = super().examples()
        example.module.model.norm.weight.data += torch.rand(1)
        return [example]


class Greedy(Broken):
    def declines_module(self, module):
        return None if isinstance(module, nn.Linear) else super().declines_module(module)


class Misnaming(Broken):
    def blocks(self, module):
        return [
            Block(block.name, block.module, tuple(Layer(f"a.{la.name}", la.parameter) for la in block.layers))
            for block in super().blocks(module)
        ]


class Doubling(Broken):
    shapes = ((*Llama.shapes[0], "q_proj"),)

    def blocks(self, module):
        return [dataclasses.replace(block, layers=block.layers[:1] + block.layers) for block in super().blocks(module)]


class Skipping(Broken):
    """Scales the output where the blocks have been replaced."""

    def forward(self, module, batch):
        output = super().forward(module, batch)
        if "forward" in vars(module.model.layers[0]):
            output["logits"] = output["logits"] * 1.5
        return output


class FirstSample(Layer):
    """Sees one sample, as if a router had chosen it."""

    def inputs(self, value, samples):
        return super().inputs(value, samples)[:1]


class Partial(Broken):
    def blocks(self, module):
        return [
            dataclasses.replace(block, layers=tuple(FirstSample(la.name, la.parameter) for la in block.layers))
            for block in super().blocks(module)
        ]


class Counting(Broken):
    def examples(self):
        (example,) = super().examples()
        example.module.register_buffer("seen", torch.zeros(()))
        return [example]

    def batch(self, data, module):
        if hasattr(module, "seen"):  # not once it was loaded again
            module.seen += 1
        return super().batch(data, module)


class Averaging(Broken):
    def losses(self, output, batch):
        losses = super().losses(output, batch)
        return 0.5 * losses + 0.5 * losses.mean()


class Rounding(Broken):
    def load(self, reference, dtype):
        module, processor = super().load(reference, dtype)
        module.lm_head.weight.data *= 1 + 1e-6
        return module, processor


class Shifting(Broken):
    """Its skeleton sees other positions than the model does."""

    def skeleton(self, reference, dtype):
        skeleton = super().skeleton(reference, dtype)
        skeleton.module.model.rotary_emb.inv_freq *= 2
        return skeleton


class Vague(Broken):
    def attention_heads(self, module):
        return 2.5


class Bare(Llama):
    def examples(self):
        return []


BROKEN = {
    Bare: "it brings examples",
    Restless: "it brings examples",
    Greedy: "other models are declined",
    Misnaming: "blocks have layers of the model's parameters",
    Doubling: "each weight is one layer",
    Skipping: "blocks form a chain",
    Partial: "layers receive their inputs",
    Counting: "pruning changes layers alone",
    Averaging: "losses are each sample's own",
    Rounding: "saved models load as they were",
    Shifting: "streamed models are pruned alike",
    Vague: "sizes are whole numbers",
}


PRUNING = {
    "layers receive their inputs",
    "pruning changes layers alone",
    "saved models load as they were",
    "streamed models are pruned alike",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_adapter_is_caught_by_the_check_of_what_it_breaks(broken):
    failed = {check.name: said for check, said in run_checks([broken()]) if said is not None}
    assert BROKEN[broken] in failed, failed
    # What the engine refuses fails every check that prunes.
    assert set(failed) <= {BROKEN[broken]} | (PRUNING if broken in (Doubling, Partial) else set()), failed


def test_an_adapter_without_examples_is_told_how_to_bring_some():
    with pytest.raises(AssertionError, match=r"fails 1 checks\nit brings examples: .* override `examples\(\)`"):
        check_adapter(Bare())
