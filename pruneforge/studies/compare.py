"""`pruneforge.compare`: run a study, and write its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneforge.documents import parse_yaml, read_yaml
from pruneforge.errors import PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import Progress
from pruneforge.studies.executors import make_executor
from pruneforge.studies.report import write_report
from pruneforge.studies.results import Row
from pruneforge.studies.run import run_study
from pruneforge.studies.study import Study, make_study


def compare(
    study: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    cells: Sequence[str] = (),
    executor: str = "local",
    executor_options: Mapping[str, Any] | None = None,
    progress: bool | Progress = False,
) -> list[Row]:
    """Prune models by methods to patterns with several draws of calibration data, and evaluate every result.

    A cell that `output` holds already is not run again; one that failed is tried again.

    Args:
        study: A YAML file, or what it would hold: `models`, `methods`, `patterns`, `seeds` and so on.
        output: Folder for the cells, the results and the report, new or of the same study.
        cells: Which cells to run, by keys with wildcards or as a part such as "2/16"; then no report is written. All by
            default.
        executor: Where they run: "local" or "ray".
        executor_options: Options of the executor, such as `{"workers": 2}`.
        progress: `True` for bars on a terminal, and lines elsewhere.

    Returns:
        A row for each cell and task, as in `results.json`; none if `cells` names some.

    Raises:
        PruneForgeError: Something asked for does not exist or does not fit; no cell has run. A cell that fails raises
            nothing: its rows have the reason in `failed`.
    """
    made = read_study(Path(study)) if isinstance(study, str | Path) else make_study(study)
    place = Path(output)
    where = make_executor(executor, **(executor_options or {}))
    every = run_study(made, place, progress, where, cells)
    return [] if cells else write_report(made, every, place)


def read_study(file: Path) -> Study:
    """Return the study that a YAML file holds.

    Raises:
        PruneForgeError: The file cannot be read, or something in it does not fit.
    """
    return _made(read_yaml(file, "study"), str(file))


def shipped_study(name: str) -> Study:
    """Return a study that a plugin ships.

    Raises:
        PruneForgeError: No plugin ships one of that name, or something in it does not fit.
    """
    return _made(parse_yaml(loaded_plugins().registry.file("study", name).read(), f"study {name!r}"), name)


def _made(values: Any, name: str) -> Study:
    if not isinstance(values, dict):
        raise PruneForgeError(f"study {name!r} must be a mapping with models, methods and patterns")
    return make_study(values, f"study {name!r}")
