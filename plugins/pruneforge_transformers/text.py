"""Adapters of text models, which differ in the shapes of their blocks, in their head and in its loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneforge import Adapter, Batch, Block, PruneForgeError, Skeleton
from pruneforge_transformers import gguf_files
from pruneforge_transformers.blocks import Shapes, blocks_of, not_of_shape
from pruneforge_transformers.checkpoints import (
    load_pretrained,
    save_pretrained,
    skeleton_from_checkpoint,
    skeleton_from_config,
)
from pruneforge_transformers.tokens import mean_losses, token_inputs, tokenizer_of


class TextModel(Adapter):
    """A transformers model of text, recognised by the shape of its blocks and not by its name.

    Attributes:
        shapes: The shapes that its blocks may have.
        family: Whose shapes these are, for messages.
    """

    shapes: ClassVar[Shapes]
    family: ClassVar[str]

    @abstractmethod
    def auto(self, reference: str) -> str:
        """Return the name of the transformers class that builds the model.

        Raises:
            PruneForgeError: The configuration cannot be read, or its head is not one of this adapter's.
        """

    @abstractmethod
    def lacks_head(self, module: Any) -> str | None:
        """Return why a transformers model has no head of this adapter's, or `None` if it has one."""

    def declines(self, reference: str) -> str | None:
        """Build the model without weights from its configuration and check its shape."""
        try:
            return self.declines_module(skeleton_from_config(reference, self.auto(reference)))
        except PruneForgeError as error:
            return str(error)

    def declines_module(self, module: Any) -> str | None:
        """Check for one list of blocks of a known shape, and for the head."""
        if not hasattr(module, "get_output_embeddings") or not hasattr(module, "config"):
            return f"{type(module).__name__} is not a transformers model"
        missing = self.lacks_head(module)
        if missing is not None:
            return missing
        blocks = self.blocks(module)
        if not blocks:
            return f"{type(module).__name__} has no list of blocks"
        for block in blocks:
            reason = not_of_shape(block, self.shapes)
            if reason is not None:
                return f"block {block.name} {reason}, which is not {self.family}'s shape"
        return None

    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
        """Load the model, and its tokenizer if there is one."""
        return load_pretrained(reference, self.auto(reference), dtype), tokenizer_of(reference)

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        """Build the model without weights from its configuration."""
        built = skeleton_from_checkpoint(reference, self.auto(reference), dtype)
        if built is None:
            return None
        model: Any = built[0]
        return Skeleton(model, tokenizer_of(reference), built[1], f"{model.base_model_prefix}.")

    def remarks(self, reference: str) -> Sequence[str]:
        """Return what a GGUF file was de-quantised from."""
        return gguf_files.remarks(reference)

    def save(self, module: Any, processor: Any, folder: Path) -> None:
        """Write the layout that `from_pretrained` loads."""
        save_pretrained(module, processor, folder)

    def blocks(self, module: nn.Module) -> list[Block]:
        """Return the blocks; all their linear layers are prunable."""
        return blocks_of(module, self.shapes)

    def token_inputs(self, data: Tensor | Mapping[str, Tensor], module: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return a batch's tensors by name, and which tokens are no padding, once they fit `module`.

        Raises:
            PruneForgeError: They do not.
        """
        return token_inputs(data, module.get_input_embeddings().weight.shape[0], self.context_length(module))

    def logits(self, output: Any) -> Tensor:
        """Return the logits of each token, or of each text."""
        logits: Tensor = output.logits
        return logits

    def attention_heads(self, module: Any) -> int:
        """Return the number of query heads."""
        return int(module.config.get_text_config().num_attention_heads)

    def context_length(self, module: Any) -> int | None:
        """Return the number of positions in the configuration, if it has one."""
        return getattr(module.config.get_text_config(), "max_position_embeddings", None)


class CausalLanguageModel(TextModel):
    """A model that predicts each token from those before it."""

    def auto(self, reference: str) -> str:
        """Return the class for causal language models."""
        return "AutoModelForCausalLM"

    def lacks_head(self, module: Any) -> str | None:
        """Check for a language model head."""
        if module.get_output_embeddings() is None:
            return f"{type(module).__name__} has no language model head"
        return None

    def batch(self, data: Tensor | Mapping[str, Tensor], module: Any) -> Batch:
        """Return a batch of token ids [samples, tokens].

        Args:
            data: Token ids, or a mapping with `input_ids` and optionally `attention_mask`; `labels` are ignored.
            module: The model.

        Raises:
            PruneForgeError: The tensors do not fit each other or the model.
        """
        if isinstance(data, Mapping):
            data = {name: value for name, value in data.items() if name != "labels"}
        inputs, valid = self.token_inputs(data, module)
        samples, tokens = inputs["input_ids"].shape
        return Batch(inputs, samples, valid, loss="mean cross-entropy of the next token", tokens=tokens)

    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the model without a key-value cache."""
        return module(**batch.inputs, use_cache=False)

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sequence's mean cross-entropy of the next token [samples], in float32 or better."""
        counted = None if batch.valid is None else batch.valid[:, 1:] & batch.valid[:, :-1]
        return mean_losses(output.logits[:, :-1], batch.inputs["input_ids"][:, 1:], counted)

    def logits_a_token(self, module: Any) -> int:
        """Return the size of the vocabulary."""
        return int(module.get_output_embeddings().weight.shape[0])
