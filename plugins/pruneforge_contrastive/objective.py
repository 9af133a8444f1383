"""InfoNCE (van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018) for encoders."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pruneforge import Batch, Objective, PruneForgeError


class Contrastive(Objective):
    """Cross-entropy of finding each query's positive among those of its batch, by cosine similarity times `scale`.

    Samples 2i and 2i + 1 of a batch are a query and its positive, as the source `pairs` gives them; the other pairs'
    positives are the negatives. With q and p the pooled last hidden states divided by their norms, pair i has the loss
    `-log(exp(scale q_i p_i) / sum_j exp(scale q_i p_j))`. Each sample of the pair has half of it, so that the losses of
    a batch sum to those of its pairs.

    A sample's own gradient is the part of the gradient of that sum which flows through the sample's tokens. A query's
    is through its own loss; a positive's is through the losses of all queries of the batch, to which it is a negative.
    They add up to the gradient of the whole. Their squares depend on the batch: more pairs are more negatives.
    """

    whole_batches = True

    class Options(Objective.Options):
        """Options of the loss."""

        scale: float = Field(20.0, gt=0, description="factor on the cosine, one over the temperature")
        pooling: Literal["mean", "last"] = Field(
            "mean", description="a text's embedding: the mean over its tokens, or its last token's"
        )

    options: Options

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each sample's loss [samples], in float32 or better.

        Raises:
            PruneForgeError: The output has no last hidden state, or the batch is not two pairs or more.
        """
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise PruneForgeError(
                f"objective {self.name!r} needs the last hidden state, and the model puts out {type(output).__name__} "
                "without it; take an encoder without a head, as AutoModel of transformers saves it"
            )
        if batch.size < 4 or batch.size % 2:
            raise PruneForgeError(
                f"objective {self.name!r} compares two pairs or more, and a batch has {batch.size} samples; use an "
                "even `batch_size` of 4 or more, of which `samples` are a multiple"
            )
        pooled = self._pooled(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), batch.valid)
        queries, positives = F.normalize(pooled, dim=1).view(batch.size // 2, 2, -1).unbind(1)
        pairs = torch.arange(len(queries), device=hidden.device)
        losses = F.cross_entropy(self.options.scale * queries @ positives.T, pairs, reduction="none")
        return (losses / 2).repeat_interleave(2)

    def _pooled(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """Return the embedding of each text [samples, hidden], from [samples, tokens, hidden]; padding has no part."""
        if valid is None:
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.options.pooling == "mean":
            # `where`, not a product: what stands at padding may be NaN.
            return torch.where(valid[:, :, None], hidden, 0).sum(1) / valid.sum(1, keepdim=True)
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(valid, places, 0).amax(1)  # whichever side the padding is on
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
