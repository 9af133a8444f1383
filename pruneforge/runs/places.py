"""What a reference to a model means, and what a folder is that is no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from pruneforge.checkpoint.journal import JOURNAL_FILE
from pruneforge.checkpoint.masks import MASKS_FILE
from pruneforge.errors import PruneForgeError

STUDY_FILE = "study.yaml"
"""What a study's folder holds of what was asked for."""


def hub_id(reference: str) -> str | None:
    """Return the repository on the Hub that a reference names, as OWNER/NAME, as far as that can be known here."""
    name = split_revision(reference)[0].removeprefix("hf-hub:").partition("@")[0]
    return name if _is_repository(name) and "/" in name and not Path(name).exists() else None


def split_revision(reference: str) -> tuple[str, str | None]:
    """Return a hub id and what follows it after an `@`: a branch, tag or commit; anything else as it is."""
    name, at, revision = reference.partition("@")
    if not at or not revision or not _is_repository(name) or Path(reference).exists():
        return reference, None
    return name, revision


def commit_of(reference: str) -> str | None:
    """Return the commit of a hub model that is in the Hub's cache, or `None` where that cannot be known."""
    repository, revision = hub_id(reference), split_revision(reference)[1]
    cached = try_to_load_from_cache(repository, "config.json", revision=revision) if repository else None
    return Path(cached).parent.name if isinstance(cached, str) else None


def download(repository: str, revision: str) -> Path:
    """Return the folder of a model's files at a revision, in the Hub's cache.

    Raises:
        PruneForgeError: They cannot be downloaded.
    """
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md"]
    asked: dict[str, Any] = {"revision": revision, "allow_patterns": files, "ignore_patterns": ["*/*"]}
    try:
        try:
            return Path(snapshot_download(repository, **asked))
        except OfflineModeIsEnabled:  # some versions ask the Hub for the files of a commit that the cache holds
            return Path(snapshot_download(repository, **asked, local_files_only=True))
    except Exception as error:  # hub, network and cache raise many kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise PruneForgeError(
            f"model {repository!r} cannot be downloaded at revision {revision!r}: {reason}"
        ) from error


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_place(reference: str) -> None:
    """Raise if a reference to a model is plainly something else.

    Raises:
        PruneForgeError: Saying what it is, and what to type instead.
    """
    path = Path(reference)
    if not reference.strip():
        raise PruneForgeError("the model's name is empty; give a folder or a hub id")
    if _is_path(reference) and not path.exists():
        raise PruneForgeError(f"model folder {reference!r} does not exist")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise PruneForgeError(f"{reference!r} is a pipe, device or the like; a model is a folder or a hub id")
    if not path.is_dir():
        return
    if (path / JOURNAL_FILE).is_file():
        raise PruneForgeError(f"{reference!r} holds an unfinished run; finish it first: its own command, with `resume`")
    if (path / STUDY_FILE).is_file() and (path / "cells").is_dir():
        raise PruneForgeError(
            f"{reference!r} is the folder of a study, whose report.html shows its results; it has no model"
        )
    made = sorted(file.parent for file in path.glob(f"*/{MASKS_FILE}"))
    if made and not (path / "config.json").is_file():
        raise PruneForgeError(f"{reference!r} holds {len(made)} pruned models; name one, such as {str(made[0])!r}")


def _is_path(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1
