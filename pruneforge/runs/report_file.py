"""Reports on disk: written, read, found beside a model, and checked for what the rest relies on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from pydantic import BaseModel, ConfigDict, ValidationError

from pruneforge.checkpoint.durable import write_text
from pruneforge.documents import read_json
from pruneforge.errors import PruneForgeError
from pruneforge.runs.places import hub_id, split_revision

REPORT_FILE = "pruneforge.json"
FORMAT = 1


class _Part(BaseModel):
    """An object of a report, of which some keys are relied on; the others are whatever they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Named(_Part):
    name: str
    options: dict[str, Any]


class _Pattern(_Part):
    pattern: str
    scope: str | None


class _Sparsity(_Part):
    weights: int
    pruned: int
    reached: float


class _Layer(_Part):
    shape: list[int]
    pruned: int
    sparsity: float


class _Recipe(_Part):
    model: str
    seed: int = 0
    calibration: str | None = None


class _Model(_Part):
    reference: str
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    fingerprint: str
    license: dict[str, str] = {}


class _Calibration(_Part):
    source: str
    samples: int
    tokens: int = 0


class _Outcome(_Part):
    task: str
    recipe: dict[str, Any]


class _Versions(_Part):
    pruneforge: str


class _Measured(_Part):
    seconds: dict[str, float]
    peak_memory: dict[str, Any]
    recovered: list[dict[str, Any]] = []


class _Report(_Part):
    """What is read of a report; the rest is for people."""

    recipe: _Recipe
    metric: _Named
    pattern: _Pattern
    model: _Model
    calibration: _Calibration | None
    sparsity: _Sparsity
    layers: dict[str, _Layer]
    excluded: list[str]
    updated: list[str] = []
    warnings: list[str]
    evaluation: list[_Outcome]
    identity: dict[str, Any] = {}
    versions: _Versions
    measured: _Measured
    allocator: _Named | None = None
    refiners: list[_Named] = []
    recovery: _Named | None = None
    objective: _Named | None = None
    recovered: list[_Named] = []
    masks: dict[str, Any] = {}


def save_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write a report to `folder`, or replace the one that is there."""
    write_text(json.dumps(report, indent=2) + "\n", folder / REPORT_FILE)


def is_pruned(folder: Path) -> bool:
    """Return whether a folder holds a report of ours, and not another file of its name."""
    try:
        return load_report(folder) is not None
    except PruneForgeError:
        return False


def record_evaluation(folder: Path, outcome: Mapping[str, Any]) -> str | None:
    """Add an evaluation to the report in `folder`, replacing an earlier one of the same recipe.

    Returns:
        The reason if the report cannot be read or written, else `None`: what was evaluated is not lost for that.
    """
    try:
        report = load_report(folder)
        if report is None:
            return None
        others = [known for known in report["evaluation"] if known["recipe"] != outcome["recipe"]]
        report["evaluation"] = [*others, dict(outcome)]
        save_report(report, folder)
    except (PruneForgeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"the evaluation could not be added to {str(folder / REPORT_FILE)!r}: {reason}"
    return None


def find_report(reference: str) -> dict[str, Any] | None:
    """Return the report of the model that a folder or hub id names, or `None` if there is none.

    A hub id's is downloaded to the Hub's cache; without a network one that is there is read.

    Raises:
        PruneForgeError: It is damaged or of another format, or the Hub refuses to say.
    """
    repository = hub_id(reference)
    if repository is None:
        return load_report(Path(reference))
    revision = split_revision(reference)[1]
    try:
        return load_report(Path(hf_hub_download(repository, REPORT_FILE, revision=revision)).parent)
    except (EntryNotFoundError, RepositoryNotFoundError):  # it has none, or neither the Hub nor its cache says so
        return None
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:200]
        raise PruneForgeError(f"the report of {reference!r} cannot be read from the Hub: {reason}") from error


def load_report(folder: Path) -> dict[str, Any] | None:
    """Return the report in `folder`, or `None` if there is none.

    Raises:
        PruneForgeError: The file is damaged, of another format, or lacks what is relied on.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    report = read_json(path, "report")
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise PruneForgeError(f"report {str(path)!r} is not of format {FORMAT}; it comes from another version")
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PruneForgeError(f"report {str(path)!r} was edited or is damaged: {where}: {first['msg']}") from error
    return report
