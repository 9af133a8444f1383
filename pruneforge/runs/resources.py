"""What a run may use and how it shows itself: settings that do not decide its output, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pruneforge.progress import Progress

if TYPE_CHECKING:
    from pruneforge.engine.budget import Budgets


class Resources(BaseModel):
    """Settings beside the recipe; a run with others gives the same bytes, but for a small budget's batch size."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    memory_budget: str | int | None = Field(
        None,
        description="What the run may take in host memory, as bytes or such as 3GB; hidden states that do not fit wait "
        "on disk. Most of what is free by default.",
    )
    device_memory_budget: str | int | None = Field(
        None,
        description="The same for a CUDA device; what does not fit waits in host memory. Most of what is free by "
        "default.",
    )
    gradient_cache: Path | None = Field(
        None,
        description="Folder that keeps gradient statistics for later runs on the same model and data; by default "
        "$PRUNEFORGE_CACHE, or the user's cache folder.",
        json_schema_extra={"metavar": "DIR"},
    )
    resume: bool = Field(
        False,
        description="Go on with the unfinished run in the output folder, if there is one. It must be the same run: "
        "recipe, model, data and versions.",
    )
    profile: bool = Field(
        False,
        description="Measure time and memory by stage and block for the report, and leave a trace in the output that "
        "https://ui.perfetto.dev opens.",
    )
    details: bool = Field(
        False,
        description="Measure the error of each layer's output and the distribution of its scores for the report; takes "
        "calibration data and the time of their Gram matrices.",
    )
    observe: list[str] = Field(
        default_factory=list,
        description="Name of an observer that logs the run, or name:project; `pruneforge plugins` lists them.",
    )
    observe_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the observer; of several observers, by name."
    )
    progress: bool | Progress = Field(
        False, exclude=True, description="True for bars on a terminal, and lines elsewhere."
    )

    @field_validator("observe", mode="before")
    @classmethod
    def _one_observer(cls, asked: Any) -> Any:
        """Take one observer as a text."""
        return [asked] if isinstance(asked, str) else asked

    @property
    def budgets(self) -> Budgets:
        """Bytes that the run may take.

        Raises:
            PruneForgeError: A budget is not a number of bytes.
        """
        from pruneforge.engine.budget import Budgets  # imports torch, without which the help shows these fields

        return Budgets.parse(self.memory_budget, self.device_memory_budget)
