"""BERT (Devlin et al., 2019), RoBERTa, DistilBERT and other transformers encoders of text of their kin.

Such a block has attention that sees all tokens, and an MLP of two layers. The head predicts masked tokens, or the class
of a text; encoders that embed texts have none. Batches are best padded, each text with its own first and last token, as
these models are trained; then give `attention_mask`, so that statistics ignore padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from pruneforge import Batch, Example, Layer, PruneForgeError
from pruneforge_transformers.checkpoints import config_of
from pruneforge_transformers.text import TextModel
from pruneforge_transformers.tokens import mean_losses

IGNORED = -100
"""Label of tokens that have no part in the loss, as transformers' collators give it."""

HEADS = {
    "AutoModelForMaskedLM": MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModel": MODEL_MAPPING,  # without a head
}
"""The transformers class that builds a model with each head, and which classes these are by configuration."""

NO_LOSS = "an encoder without a head has neither logits nor a loss of its own; take gradients of one with `objective`"


class BERT(TextModel):
    """Encoders of text with a masked language model or classification head, or without a head.

    The loss of a sample is the mean cross-entropy of its labelled tokens, or of its class. Without labels, it is that
    of the tokens themselves at all positions but padding, which the model sees, or of the class that it predicts. An
    encoder without a head has no loss: methods that use gradients of the model need an objective.
    """

    family = "BERT"
    shapes = (
        ("query", "key", "value", "dense", "dense", "dense"),  # BERT, RoBERTa, ELECTRA
        ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),  # DistilBERT
        ("q", "k", "v", "o", "dense", "dense"),  # MPNet
        ("Wqkv", "Wo", "Wi", "Wo"),  # ModernBERT
    )

    def auto(self, reference: str) -> str:
        """Return the class for the head of the architecture in the configuration."""
        config = config_of(reference)
        for auto in HEADS:
            if any(kind.__name__ in (config.architectures or ()) for kind in _classes_of(auto, config)):
                return auto
        named = ", ".join(config.architectures or ()) or "no architecture"
        raise PruneForgeError(f"its configuration names {named}, which is no encoder of text with a head known here")

    def lacks_head(self, module: Any) -> str | None:
        """Check for one of the heads, with a cross-entropy as its loss, or for none."""
        name = type(module).__name__
        if not any(isinstance(module, _classes_of(auto, module.config)) for auto in HEADS):
            return f"{name} has a head that neither predicts masked tokens nor classifies texts"
        if getattr(module.config, "is_decoder", False):
            return f"{name} is a decoder by its configuration"
        one_of_several = getattr(module.config, "problem_type", None) in (None, "single_label_classification")
        if _classifies(module) and (module.config.num_labels < 2 or not one_of_several):
            return f"the head of {name} does not choose one of several classes"
        return None

    def batch(self, data: Tensor | Mapping[str, Tensor], module: Any) -> Batch:
        """Return a batch of token ids [samples, tokens].

        Args:
            data: Token ids, or a mapping with `input_ids` and optionally `attention_mask`, `token_type_ids` and
                `labels`: int64 [samples, tokens] with -100 where a token has none, or [samples] for a classifier.
            module: The model.

        Raises:
            PruneForgeError: The tensors do not fit each other or the model.
        """
        inputs, valid = self.token_inputs(data, module)
        targets = inputs.pop("labels", None)
        samples, tokens = inputs["input_ids"].shape
        if _has_no_head(module):
            if targets is not None:
                raise PruneForgeError("an encoder without a head has no use for the labels of a batch; leave them out")
            return Batch(inputs, samples, valid, None, "none, without a head", tokens)
        classifies = _classifies(module)
        if targets is not None:
            shape = (samples,) if classifies else (samples, tokens)
            classes = module.config.num_labels if classifies else self.logits_a_token(module)
            _check_labels(targets, shape, classes)
        if classifies:
            loss = "cross-entropy of the " + ("model's own prediction" if targets is None else "label")
        else:
            loss = "mean cross-entropy of the " + ("tokens themselves" if targets is None else "labelled tokens")
        return Batch(inputs, samples, valid, targets, loss, tokens)

    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the model."""
        return module(**batch.inputs)

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sample's loss [samples], in float32 or better.

        Raises:
            PruneForgeError: The model has no head.
        """
        logits, targets = self.logits(output), batch.targets
        if logits.dim() == 2:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, logits.detach().argmax(1) if targets is None else targets, reduction="none")
        if targets is None:
            return mean_losses(logits, batch.inputs["input_ids"], batch.valid)
        return mean_losses(logits, targets.clamp(min=0), targets != IGNORED)

    def logits(self, output: Any) -> Tensor:
        """Return the logits of each token, or of each text.

        Raises:
            PruneForgeError: The model has no head.
        """
        if not hasattr(output, "logits"):
            raise PruneForgeError(NO_LOSS)
        return super().logits(output)

    def head(self, module: Any) -> Layer | None:
        """Return the last linear layer outside of the blocks, or `None` without a head: a pooler makes no logits."""
        return None if _has_no_head(module) else super().head(module)

    def logits_a_token(self, module: Any) -> int:
        """Return the size of the vocabulary, or 0 for a classifier or without a head."""
        head = module.get_output_embeddings()
        return 0 if head is None else int(head.weight.shape[0])

    def context_length(self, module: Any) -> int | None:
        """Return the number of positions, without those of RoBERTa that come before the first token's."""
        for name, part in module.named_modules():
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
                return int(part.num_embeddings - part.padding_idx - 1)
        return super().context_length(module)

    def examples(self) -> Sequence[Example]:
        """Return BERT and DistilBERT with a masked language model head."""
        from pruneforge_bert.examples import examples

        return examples()


def _classes_of(auto: str, config: Any) -> tuple[type, ...]:
    """Return the classes that transformers may build for a configuration with a head."""
    kinds: Any = HEADS[auto].get(type(config), ())
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _classifies(module: Any) -> bool:
    return isinstance(module, _classes_of("AutoModelForSequenceClassification", module.config))


def _has_no_head(module: Any) -> bool:
    return isinstance(module, _classes_of("AutoModel", module.config))


def _check_labels(labels: Tensor, shape: tuple[int, ...], classes: int) -> None:
    """Raise unless labels are class numbers of this shape, or left out."""
    if labels.shape != shape or labels.is_floating_point():
        raise PruneForgeError(f"labels of a batch must be int64 {shape}; got {labels.dtype} {tuple(labels.shape)}")
    known = labels[labels != IGNORED] if len(shape) == 2 else labels
    if known.numel() and (known.min() < 0 or known.max() >= classes):
        raise PruneForgeError(f"labels of a batch are from {known.min()} to {known.max()}; there are {classes} classes")
