"""A tiny mixture of experts, and an adapter that lists the slices that transformers keeps in one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from pruneforge import Block, Skeleton, SlicedLayer, find_layers
from pruneforge.plugins import loaded_plugins
from pruneforge_transformers.text import CausalLanguageModel

EXPERTS = 5
MISSED = 4
"""The expert that no token reaches; see `tiny`."""


class Mixtral(CausalLanguageModel):
    """Every expert's weights, beside those of attention."""

    def declines_module(self, module: Any) -> str | None:
        return None if isinstance(module, MixtralForCausalLM) else f"{type(module).__name__} is not Mixtral"

    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
        module, processor = super().load(reference, dtype)
        module.set_experts_implementation("eager")  # by default one kernel runs all experts
        return module, processor

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        made = super().skeleton(reference, dtype)
        if made is not None:
            made.module.set_experts_implementation("eager")
        return made

    def blocks(self, module: Any) -> list[Block]:
        blocks = []
        for index, block in enumerate(module.model.layers):
            name = f"model.layers.{index}"
            experts = [
                SlicedLayer(f"{name}.mlp.experts.{kind}.{number}", weights, number, routed=True)
                for kind, weights in block.mlp.experts.named_parameters()
                for number in range(EXPERTS)
            ]
            blocks.append(Block(name, block, (*find_layers(block, name), *experts)))
        return blocks


@contextmanager
def registered() -> Iterator[None]:
    """Let the adapter take models within the context."""
    registry = loaded_plugins().registry
    registry.plugin = "experts"
    registry.adapter("mixtral", Mixtral)
    yield
    registry.drop("experts")


def tiny(dtype: torch.dtype = torch.float64) -> MixtralForCausalLM:
    """Return a model whose second block never chooses its last expert.

    Two pairs of routers are opposite to each other, so of each pair one is above the last one's, which is 0.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    routers = model.model.layers[1].mlp.gate.weight.data
    routers[1], routers[3], routers[MISSED] = -routers[0], -routers[2], 0
    return model
