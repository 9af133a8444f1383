"""GPT-2 (Radford et al., 2019), OPT (Zhang et al., 2022) and transformers causal language models of their kin.

Such a block has attention, with projections apart or fused, and an MLP of two layers without a gate. GPT-2's layers are
`Conv1D`, which stores weights as [in, out]; the others' are linear. OPT is what the pruning papers' first grids are on.
"""

from __future__ import annotations

from collections.abc import Sequence

from pruneforge import Example
from pruneforge_transformers.text import CausalLanguageModel


class GPT(CausalLanguageModel):
    """Causal language models whose blocks have GPT's shape."""

    family = "GPT"
    shapes = (
        ("c_attn", "c_proj", "c_fc", "c_proj"),  # GPT-2, GPT-BigCode
        ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"),  # OPT, BioGPT
        ("k_proj", "v_proj", "q_proj", "out_proj", "c_fc", "c_proj"),  # GPT-Neo
        ("k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out"),  # GPT-J
        ("qkv_proj", "out_proj", "fc_in", "fc_out"),  # CodeGen
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon, Persimmon
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),  # Phi
        ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),  # StarCoder2
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),  # Nemotron
        ("Wqkv", "out_proj", "up_proj", "down_proj"),  # MPT
    )

    def examples(self) -> Sequence[Example]:
        """Return GPT-2, OPT and GPT-NeoX, which differ in how they hold their projections."""
        from pruneforge_gpt.examples import examples

        return examples()
