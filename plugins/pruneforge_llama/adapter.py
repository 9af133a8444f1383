"""LLaMA-1/2 (Touvron et al., 2023) and every transformers causal language model of the same block shape.

Such a block has attention with four projections (with or without grouped queries, biases, and query and key norms) and
a gated MLP with three. Models are recognised by this shape and not by name, so Mistral, Qwen2 and 3, Gemma 1 to 3,
SmolLM, Granite and others are included. The masks and positions of a block (sliding windows, per-layer rotary bases)
come from the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pruneforge import Adapter, Batch, Block, PruneForgeError, Skeleton, find_layers
from pruneforge_transformers.checkpoints import (
    load_pretrained,
    save_pretrained,
    skeleton_from_checkpoint,
    skeleton_from_config,
)

AUTO = "AutoModelForCausalLM"

SHAPES = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
)
"""Names of a block's linear layers: separate, or fused as in Phi-3."""

PART = 1 << 24
"""Number of logits that are converted to float32 at a time."""


class Llama(Adapter):
    """Causal language models whose blocks have LLaMA's shape."""

    def declines(self, reference: str) -> str | None:
        """Build the model without weights from its configuration and check its shape."""
        try:
            return self.declines_module(skeleton_from_config(reference, AUTO))
        except PruneForgeError as error:
            return str(error)

    def declines_module(self, module: Any) -> str | None:
        """Check for one list of blocks of LLaMA's shape, and for a language model head."""
        if not hasattr(module, "get_output_embeddings") or not hasattr(module, "config"):
            return f"{type(module).__name__} is not a transformers model"
        if module.get_output_embeddings() is None:
            return f"{type(module).__name__} has no language model head"
        block_list = _block_list(module)
        if block_list is None:
            return f"{type(module).__name__} has no list of decoder blocks"
        for name, block in zip(_names(module, block_list), block_list, strict=True):
            reason = _not_of_shape(block)
            if reason is not None:
                return f"block {name} {reason}"
        return None

    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
        """Load the model, and its tokenizer if there is one."""
        return load_pretrained(reference, AUTO, dtype), _tokenizer(reference)

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        """Build the model without weights from its configuration."""
        built = skeleton_from_checkpoint(reference, AUTO, dtype)
        return None if built is None else Skeleton(built[0], _tokenizer(reference), built[1])

    def save(self, module: Any, processor: Any, folder: Path) -> None:
        """Write the layout that `AutoModelForCausalLM.from_pretrained` loads."""
        save_pretrained(module, processor, folder)

    def blocks(self, module: nn.Module) -> list[Block]:
        """Return the decoder blocks; all their linear layers are prunable."""
        block_list = _block_list(module)
        assert block_list is not None
        names = _names(module, block_list)
        return [
            Block(name, block, tuple(find_layers(block, name))) for name, block in zip(names, block_list, strict=True)
        ]

    def batch(self, data: Tensor | Mapping[str, Tensor], module: Any) -> Batch:
        """Return a batch of token ids [samples, tokens].

        Args:
            data: Token ids, or a mapping with `input_ids` and optionally `attention_mask`; `labels` are ignored.
            module: The model.

        Raises:
            PruneForgeError: The tensors do not fit each other or the model.
        """
        inputs = {"input_ids": data} if isinstance(data, Tensor) else dict(data) if isinstance(data, Mapping) else {}
        inputs.pop("labels", None)
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(data).__name__
            raise PruneForgeError(f"a batch must hold token ids, int64 [samples, tokens], maybe with a mask; got {got}")
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise PruneForgeError(f"{name} of a batch must be a tensor; got {type(value).__name__}")
        vocabulary, context = module.get_input_embeddings().weight.shape[0], self.context_length(module)
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise PruneForgeError(
                f"a batch holds token id {ids.max().item() if ids.min() >= 0 else ids.min().item()}, "
                f"and the model knows 0 to {vocabulary - 1}; was another tokenizer used?"
            )
        if context and ids.shape[1] > context:
            raise PruneForgeError(f"a batch is {ids.shape[1]} tokens long, and the model's context is {context}")
        inputs["input_ids"] = ids.long()
        valid = _valid(inputs.get("attention_mask"), ids)
        loss = "mean cross-entropy of the next token"
        return Batch(inputs, size=len(ids), valid=valid, loss=loss, tokens=ids.shape[1])

    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the model without a key-value cache."""
        return module(**batch.inputs, use_cache=False)

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sequence's mean cross-entropy of the next token [samples], in float32 or better."""
        ids = batch.inputs["input_ids"]
        losses = _token_losses(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).view(len(ids), -1)
        if batch.valid is None:
            return losses.mean(dim=1)
        counted = batch.valid[:, 1:] & batch.valid[:, :-1]
        # `where`, not a product: losses at padding may be NaN.
        return torch.where(counted, losses, 0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def logits_a_token(self, module: Any) -> int:
        """Return the size of the vocabulary."""
        return int(module.get_output_embeddings().weight.shape[0])

    def attention_heads(self, module: Any) -> int:
        """Return the number of query heads."""
        return int(module.config.get_text_config().num_attention_heads)

    def context_length(self, module: Any) -> int | None:
        """Return the number of positions in the configuration, if it has one."""
        return getattr(module.config.get_text_config(), "max_position_embeddings", None)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each token's cross-entropy [tokens] of `logits` [tokens, vocabulary], in float32 or better.

    Computed for a few tokens at a time, and again in the backward pass: float32 logits, their softmax and its gradient
    would take six times the memory of bfloat16 logits.
    """
    step = max(1, PART // logits.shape[-1])
    parts = list(zip(logits.split(step), targets.split(step), strict=True))
    if len(parts) == 1:
        return _cross_entropy(*parts[0])
    return torch.cat([checkpoint(_cross_entropy, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def _tokenizer(reference: str) -> Any:
    """Return the tokenizer, or `None` if none can be loaded; batches of token ids do not need it."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None  # a text source raises an error later that says what is missing


def _valid(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Return which tokens are not padding, boolean [samples, tokens], or `None` if there is no padding.

    Raises:
        PruneForgeError: The mask does not fit the ids, or a sample is all padding.
    """
    if mask is None or bool(mask.bool().all()):
        return None
    if mask.shape != ids.shape:
        raise PruneForgeError(f"attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}")
    if not mask.bool().any(dim=1).all():
        raise PruneForgeError("a batch holds a sample that is all padding; leave it out")
    return mask.bool()


def _block_list(module: nn.Module) -> nn.ModuleList | None:
    """Return the first list of blocks of LLaMA's shape, or else the first list, which error messages then describe."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]
    fitting = (part for part in lists if all(_not_of_shape(block) is None for block in part))
    return next(fitting, lists[0] if lists else None)


def _names(module: nn.Module, blocks: nn.ModuleList) -> list[str]:
    """Return the full name of each block."""
    prefix = next(name for name, part in module.named_modules() if part is blocks)
    return [f"{prefix}.{index}" for index in range(len(blocks))]


def _not_of_shape(block: nn.Module) -> str | None:
    """Return how a block differs from LLaMA's shape, or `None` if it does not."""
    linear = [name.rpartition(".")[2] for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    if not any(sorted(linear) == sorted(shape) for shape in SHAPES):
        return f"({type(block).__name__}) has linear layers {', '.join(linear) or 'none'}, not those of LLaMA's shape"
    inside = {id(part.weight) for part in block.modules() if isinstance(part, nn.Linear)}
    for name, parameter in block.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in inside:
            return f"({type(block).__name__}) has a weight {name} {list(parameter.shape)} that is not in a linear layer"
    return None
