"""What `pruneforge.prune` returns."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pruneforge.checkpoint.masks import load_masks, load_permutations
from pruneforge.interfaces.adapter import LoadedModel
from pruneforge.plugins import loaded_plugins
from pruneforge.profile import Profile
from pruneforge.runs.loading import load_model


class PruneResult:
    """A pruned model.

    Attributes:
        report: The content of `pruneforge.json`.
        folder: The output folder, if model and masks are read from it at their first use.
        profile: Time and memory by stage and block; `None` for a result that was loaded.
    """

    def __init__(
        self,
        report: dict[str, Any],
        folder: Path | None = None,
        loaded: LoadedModel | None = None,
        masks: dict[str, Tensor] | None = None,
        dtype: str = "auto",
        profile: Profile | None = None,
        permutations: dict[str, Tensor] | None = None,
    ) -> None:
        """Hold a result that is in memory, or name the folder that it is read from at first use."""
        self.report = report
        self.profile = profile
        self.folder = folder
        self._dtype = dtype
        if loaded is not None:
            self.loaded = loaded
        if masks is not None:
            self.masks = masks
        if permutations is not None:
            self.permutations = permutations

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model with its adapter and processor."""
        assert self.folder is not None
        return load_model(self.folder, self._dtype, None, loaded_plugins().registry)

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Boolean [out, in] by full layer name, `True` keeps."""
        assert self.folder is not None
        return load_masks(self.folder)

    @cached_property
    def permutations(self) -> dict[str, Tensor]:
        """Order of the columns, int64 [in], in which each layer's mask fits its pattern, by full layer name.

        Empty unless the metric permutes: the masks fit in the layers' own order. The weights always are in their own.
        """
        assert self.folder is not None
        return load_permutations(self.folder)

    @property
    def model(self) -> nn.Module:
        """The model, its pruned weights zero."""
        return self.loaded.module
