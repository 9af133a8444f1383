"""Distillation on samples as they are and without what distracts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pruneforge_leaf.samples import Sample, padded

WEIGHT = 0.5
"""Weight of the samples as they are; that of those without flagged tokens is the rest."""


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence KL(teacher || student) of each row, from logits [rows, classes].

    In float32 or better.
    """
    dtype = torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)
    wanted, found = (F.log_softmax(logits.to(dtype), dim=-1) for logits in (teacher, student))
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def sample_loss(teacher: Any, student: Any, samples: Sequence[Sample]) -> Tensor:
    """Return the mean divergence a token of the responses, which both models see.

    Args:
        teacher: A language model of transformers, in evaluation mode; it gets no gradient.
        student: Another with the same tokens.
        samples: Instructions with their responses.

    Returns:
        The loss, scalar.
    """
    with torch.no_grad():
        wanted = _response_logits(teacher, samples)
    found = _response_logits(student, samples)
    return divergence(wanted.to(found.device), found).mean()


def _response_logits(model: Any, samples: Sequence[Sample]) -> Tensor:
    """Return what predicts the tokens of the responses [tokens, vocabulary]."""
    batch = padded(samples, next(model.parameters()).device)
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return logits[:, :-1][batch.response[:, 1:]]


def distillation_loss(
    teacher: Any, student: Any, samples: Sequence[Sample], without: Sequence[Sample], weight: float = WEIGHT
) -> Tensor:
    """Return LeaF's loss: `weight` KL on samples as they are, and the rest on those without flagged tokens.

    Args:
        teacher: The model to learn from.
        student: The model that learns.
        samples: Instructions with their responses.
        without: The same or some of them without flagged tokens, as `pruned` makes them; maybe none.
        weight: Of the samples as they are, 0 to 1; without any other samples they have all of it.

    Returns:
        The loss, scalar.
    """
    plain = sample_loss(teacher, student, samples)
    return plain if not without else weight * plain + (1 - weight) * sample_loss(teacher, student, without)
