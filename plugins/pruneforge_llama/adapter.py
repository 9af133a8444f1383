"""LLaMA-1/2 (Touvron et al., 2023) and every transformers causal language model of the same block shape.

Such a block has attention with four projections (with or without grouped queries, biases, and query and key norms) and
a gated MLP with three. Models are recognised by this shape and not by name, so Mistral, Qwen2 and 3, Gemma 1 to 3,
SmolLM, Granite and others are included. The masks and positions of a block (sliding windows, per-layer rotary bases)
come from the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from pruneforge import Example
from pruneforge_transformers.text import CausalLanguageModel


class Llama(CausalLanguageModel):
    """Causal language models whose blocks have LLaMA's shape."""

    family = "LLaMA"
    shapes = (
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),  # fused, as in Phi-3
    )

    def examples(self) -> Sequence[Example]:
        """Return LLaMA and kin that differ in attention, biases, tied embeddings and fused projections."""
        from pruneforge_llama.examples import examples

        return examples()
