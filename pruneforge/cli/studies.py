"""What the commands that run studies share: settings of all runs, and where they run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from pruneforge.cli import common
from pruneforge.cli.fields import Fields, fields_of
from pruneforge.cli.settings import OF_RUN, SettingsCommand
from pruneforge.cli.stopping import stopped

if TYPE_CHECKING:
    from pruneforge.studies.plan import Cell

Executor = Annotated[str, typer.Option(help="Where the cells run: local, or ray.", metavar="NAME")]
Workers = Annotated[
    int | None, typer.Option(help="Processes of this machine that run cells side by side.", metavar="N")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; by default RAY_ADDRESS, or a new one here.")]
NumCpus = Annotated[float | None, typer.Option(help="Cores of the Ray cluster that each part asks for.", metavar="N")]
NumGpus = Annotated[
    float | None, typer.Option(help="GPUs that each part asks for; by default one if the cluster has any.", metavar="N")
]
Seeds = Annotated[
    str, typer.Option(help="Seeds, several with commas between; each is a calibration draw.", metavar="SEEDS")
]
Controls = Annotated[
    bool, typer.Option("--controls/--no-controls", help="Show metrics that are controls beside the others.")
]


SOME_FAILED = 1
"""Exit code of a study of which a cell failed; the others are finished."""


class StudyCommand(SettingsCommand):
    """A command with an option for each setting of a study's runs, of their metric, data and evaluator."""

    plugin_options: ClassVar = {**OF_RUN, "task": ("evaluator", "task_options")}

    def plugin_named(self, chooser: str, value: Any) -> str | None:
        """Return what a setting names; with several metrics, options say whose they are: `--option NAME.alpha=1`."""
        if chooser == "metric" and isinstance(value, list | tuple):
            value = value[0] if len(value) == 1 else None
        return super().plugin_named(chooser, value)

    def fields(self) -> Fields:
        """Return the settings of a recipe that all runs share, and of its evaluation."""
        from pruneforge.interfaces.recipe import EvalRecipe, PruneRecipe

        varied = ("model", "metric", "sparsity", "pattern", "seed")
        shared = {name: field for name, field in fields_of(PruneRecipe).items() if name not in varied}
        evaluation = EvalRecipe.model_fields
        return {**shared, "task": evaluation["task"], "task_options": evaluation["options"]}


def with_options_by_name(asked: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    """Return settings in which options of several metrics or refiners are by name."""
    if len(metrics) > 1:
        asked["options"] = common.options_by_name(asked.get("options", {}), "--option")
    if len(asked.get("refine", ())) > 1:
        asked["refine_options"] = common.options_by_name(asked.get("refine_options", {}), "--refine-option")
    return asked


def numbers(text: str) -> list[int]:
    """Return the seeds that a text holds."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not whole numbers with commas between", param_hint="--seeds") from None


@contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Say what becomes of a study that is interrupted within the context."""
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"pruneforge: interrupted; the same command goes on with what is in {output}", file=sys.stderr)
        raise stopped(error) from None


def warn_of_failed(cells: Sequence[Cell], output: Path) -> int:
    """Say which cells failed and why, and return how many did."""
    from pruneforge.studies.folder import StudyFolder

    held = StudyFolder(output)
    reasons = {cell.key: (held.cell(cell) or {}).get("failed") for cell in cells}
    common.warn([f"cell {key} failed: {why}" for key, why in reasons.items() if why])
    return sum(why is not None for why in reasons.values())


def executor_options(**given: Any) -> dict[str, Any]:
    """Return the options of the executor that were given."""
    return {name: value for name, value in given.items() if value is not None}
