"""Fine-tune a pruned model with the transformers library's `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from pruneforge import KeptZeros, check_zeros, keep_zeros


class KeepZeros(TrainerCallback):
    """Keeps pruned weights zero while a `Trainer` trains a model, as `pruneforge.keep_zeros` does.

    At the end of training it checks that they are.
    """

    def __init__(self, masks: str | Path | Mapping[str, Tensor]) -> None:
        """Take masks, boolean [out, in] by layer name, or the output of a pruning run."""
        self.masks = masks
        self._kept: KeptZeros | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to keep zeros."""
        self._kept = keep_zeros(kwargs["model"], self.masks)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, and raise if a pruned weight is not zero."""
        if self._kept is not None:
            self._kept.remove()
        check_zeros(kwargs["model"], self.masks)
