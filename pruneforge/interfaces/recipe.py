"""What is asked of a run and decides its output, each setting declared once.

The options of the command line, the recipe file, the documentation of `pruneforge.prune` and the report are made from
these fields and their descriptions.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Propagate = Literal["pruned", "dense"]

LONGEST_DEFAULT = 2048
"""Tokens; the published sequence length. A model's own context may be much longer, and cost much more."""


class Recipe(BaseModel):
    """Settings that every command takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Folder, hub id or file of the model.", json_schema_extra={"metavar": "MODEL"})
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Samples that go through a block together; by default as many as have 1024 tokens on the CPU and "
        "4096 on CUDA, or fewer if a budget is small.",
    )
    device: str = Field("auto", description="Where to compute: auto, cpu, cuda or cuda:N.")
    dtype: str = Field(
        "auto", description="Dtype to compute in: float16, bfloat16, float32 or float64; auto keeps the checkpoint's."
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of every random choice.")
    plugins: list[str] = Field(
        default_factory=list, description="Python files to load as plugins.", json_schema_extra={"metavar": "FILE"}
    )


class DataRecipe(Recipe):
    """Settings of a command that takes calibration data, and may train on them."""

    calibration: str | None = Field(
        None,
        description="Source or file of the calibration data. A metric that looks at weights alone needs none.",
        json_schema_extra={"metavar": "SOURCE|PATH"},
    )
    samples: int = Field(128, ge=1, description="Sequences or images to draw from the source.")
    seqlen: int | None = Field(
        None, ge=1, description=f"Tokens per sequence; by default the model's context, at most {LONGEST_DEFAULT}."
    )
    source_options: dict[str, Any] = Field(default_factory=dict, description="Options of the calibration source.")
    adapter_options: dict[str, Any] = Field(default_factory=dict, description="Options of the model's adapter.")
    recover_options: dict[str, Any] = Field(default_factory=dict, description="Options of the recovery.")
    objective: str | None = Field(
        None,
        description="Name of an objective, the loss whose gradients metrics use and that recoveries of the whole model "
        "train for; by default the one that the model was trained for.",
    )
    objective_options: dict[str, Any] = Field(default_factory=dict, description="Options of the objective.")


class PruneRecipe(DataRecipe):
    """What `pruneforge.prune` was asked for."""

    metric: str = Field(description="Name of the metric; `pruneforge plugins` lists them.")
    sparsity: float | None = Field(
        None, description="Share of weights to prune, in [0, 1); a half by default, or what the pattern says."
    )
    pattern: str | None = Field(
        None,
        description="N:M keeps N of every M consecutive inputs; unstructured if left out.",
        json_schema_extra={"metavar": "N:M"},
    )
    streams: dict[str, str] = Field(
        default_factory=dict,
        description="Further calibration data by name, each a source or file, for methods that compare several.",
        json_schema_extra={"metavar": "NAME=SOURCE|PATH"},
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the metric.")
    exclude: list[str] = Field(
        default_factory=list,
        description="Layers to leave dense, as names with wildcards such as '*.down_proj'; the report lists them.",
        json_schema_extra={"metavar": "GLOB"},
    )
    propagate: Propagate = Field(
        "pruned",
        description="Whether calibration sees the earlier blocks pruned (as the published language-model code does) "
        "or dense.",
    )
    allocator: str | None = Field(
        None,
        description="Name of an allocator, which gives each layer its sparsity; without one all have the same.",
    )
    allocator_options: dict[str, Any] = Field(default_factory=dict, description="Options of the allocator.")
    refine: list[str] = Field(
        default_factory=list, description="Name of a refiner, which changes each mask after the metric, in this order."
    )
    refine_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the refiner; of several refiners, by name."
    )
    recover: str | None = Field(
        None,
        description="Name of a recovery, which changes the remaining weights of each block once it is pruned, or of "
        "the whole model in the end.",
    )


class RecoverRecipe(DataRecipe):
    """What `pruneforge.recover` was asked for."""

    recover: str = Field(description="Name of a recovery of the whole model; `pruneforge plugins` lists them.")


class EvalRecipe(Recipe):
    """What `pruneforge.evaluate` was asked for."""

    batch_size: int | None = Field(None, ge=1, description="Samples per batch; by default the evaluator chooses.")
    task: str = Field(description="Name of an evaluator, or name:argument; `pruneforge plugins` lists them.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the evaluator.")
