"""A base class of adapters of image classifiers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.options import Options


class ImageClassifier(Adapter):
    """An adapter of image classifiers: batches of images, and the cross-entropy of their labels.

    A subclass says how many classes and tokens a model has, which images it takes, and what its logits are.
    """

    class Options(Options):
        """Options of adapters of image classifiers."""

        prefix_tokens: bool = Field(
            True, description="let class, distillation and register tokens count in statistics as patches do"
        )

    options: Options

    def batch(self, data: Tensor | Mapping[str, Tensor], module: nn.Module) -> Batch:
        """Return a batch of images [samples, channels, height, width].

        Args:
            data: The images, or a mapping with `pixel_values` and optionally `labels`, integers [samples].
            module: The model; pixels are converted to its dtype.

        Raises:
            PruneForgeError: The images or labels do not fit the model.
        """
        inputs = {"pixel_values": data} if isinstance(data, Tensor) else dict(data) if isinstance(data, Mapping) else {}
        pixels, labels = inputs.get("pixel_values"), inputs.get("labels")
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not pixels.is_floating_point() or not len(pixels):
            got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(data).__name__
            raise PruneForgeError(f"a batch must hold images, float [samples, channels, height, width]; got {got}")
        classes = self.classes(module)
        if labels is not None and (labels.shape != pixels.shape[:1] or labels.is_floating_point()):
            raise PruneForgeError(
                f"a batch's labels must be integers [samples]; got {labels.dtype} {tuple(labels.shape)}"
            )
        labels = None if labels is None else labels.long()
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            span = f"{int(labels.min())} to {int(labels.max())}"
            raise PruneForgeError(f"a batch's labels run from {span}, and the head has {classes} classes")
        self.check_images(pixels, module)
        pixels = pixels.to(next(module.parameters()).dtype)
        return Batch({"pixel_values": pixels}, len(pixels), self._counting(pixels, module), labels, self._loss(labels))

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return each image's cross-entropy [samples], of its label, or else of the model's own prediction."""
        logits = self.logits(output)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = logits.detach().argmax(dim=1) if batch.targets is None else batch.targets
        return F.cross_entropy(logits, targets, reduction="none")

    def context_length(self, module: nn.Module) -> int | None:
        """Return `None`: images have no sequence length to choose."""
        return None

    @abstractmethod
    def classes(self, module: nn.Module) -> int:
        """Return the number of classes of the head."""

    @abstractmethod
    def logits(self, output: Any) -> Tensor:
        """Return the logits [samples, classes] in the result of `forward`."""

    @abstractmethod
    def check_images(self, pixels: Tensor, module: nn.Module) -> None:
        """Raise unless the model takes images of this size [samples, channels, height, width].

        Raises:
            PruneForgeError: Naming the sizes.
        """

    @abstractmethod
    def tokens(self, pixels: Tensor, module: nn.Module) -> tuple[int, int]:
        """Return the number of prefix tokens, and of all tokens, that blocks receive for each image."""

    def _counting(self, pixels: Tensor, module: nn.Module) -> Tensor | None:
        """Return the mask of valid tokens, boolean [samples, tokens], or `None` if prefix tokens count too."""
        if self.options.prefix_tokens:
            return None
        prefix, total = self.tokens(pixels, module)
        if prefix == 0:
            raise PruneForgeError(f"{type(module).__name__} has no prefix tokens to leave out")
        valid = torch.ones(len(pixels), total, dtype=torch.bool)
        valid[:, :prefix] = False
        return valid

    def _loss(self, labels: Tensor | None) -> str:
        of = "label" if labels is not None else "model's own prediction"
        return f"cross-entropy of the {of}"
