"""`pruneforge.push`: upload a result to the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from pruneforge.checkpoint.durable import PARTIAL
from pruneforge.checkpoint.journal import JOURNAL_FILE
from pruneforge.errors import PruneForgeError
from pruneforge.runs.card import CARD_FILE, model_card, study_card
from pruneforge.runs.report import REPORT_FILE, load_report

STUDY_FILE, STUDY_REPORT, STUDY_CARD_BODY = "study.yaml", "report.html", "report.md"
"""What a study's folder holds, the reports once it is finished."""

WORK = "work"
"""What a study's folder holds while models are made."""

Kind = Literal["model", "dataset"]


def push(folder: str | Path, to: str, *, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Upload a pruned model, or the folder of a study, to the Hub, in one commit.

    A folder without a README.md gets a card that is made from its report; the folder itself stays as it is. Journals,
    locks, and files and folders whose names begin with a dot are left out. Files that the repository has are replaced.

    Args:
        folder: The output of a pruning run, or the folder of a study.
        to: The repository, as OWNER/NAME. A model's is of the kind model, a study's of the kind dataset.
        private: Whether the repository is to be private; otherwise a new one is as its owner's settings say.
        dry_run: Whether to only say what would be uploaded, which needs neither network nor token.

    Returns:
        `repository`, `kind` ("model" or "dataset"), `files` (bytes of each, by name), `left_out` (names), `card` (the
        card's text, or `None` if the folder has one) and `url` (of the commit, or `None`).

    Raises:
        PruneForgeError: The folder holds no finished result, the repository's name is none, it is public where a
            private one is asked for, or the Hub cannot be reached or refuses.
    """
    path = Path(folder)
    kind = _kind(path)
    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise PruneForgeError(f"{to!r} is not the name of a repository: {error}") from error
    files, left_out = _files(path, kind)
    card = None if CARD_FILE in files else _card(path, kind, to.rpartition("/")[2])
    if card is not None:
        files = {CARD_FILE: len(card.encode()), **files}
    url = None if dry_run else _upload(path, to, kind, files, card, private)
    return {"repository": to, "kind": kind, "files": files, "left_out": left_out, "card": card, "url": url}


def _kind(folder: Path) -> Kind:
    """Return what a folder's repository will be.

    Raises:
        PruneForgeError: It holds no result, an unfinished one, or several.
    """
    if not folder.is_dir():
        raise PruneForgeError(f"folder {str(folder)!r} does not exist")
    if (folder / JOURNAL_FILE).is_file():
        raise PruneForgeError(f"{str(folder)!r} holds an unfinished run; finish it with `resume` before it is pushed")
    if (folder / REPORT_FILE).is_file():
        return "model"
    if (folder / STUDY_FILE).is_file():
        if not (folder / STUDY_REPORT).is_file():
            raise PruneForgeError(f"{str(folder)!r} holds an unfinished study; run it again before it is pushed")
        return "dataset"
    inner = sorted(path.parent for path in folder.glob(f"*/{REPORT_FILE}"))
    if inner:
        raise PruneForgeError(f"{str(folder)!r} holds several runs; push one of them, such as {str(inner[0])!r}")
    raise PruneForgeError(f"{str(folder)!r} is the output of neither a pruning run nor a study")


def _files(folder: Path, kind: Kind) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of each file to upload by its name, and the names of what is left out."""
    files: dict[str, int] = {}
    left_out = []
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        for name in sorted(folders):
            path = inside / name
            if name.startswith(".") or (folder / path).is_symlink() or (kind == "dataset" and str(path) == WORK):
                left_out.append(f"{path.as_posix()}/")
                folders.remove(name)
        for name in sorted(names):
            path = inside / name
            if name.startswith(".") or name.endswith((".lock", PARTIAL)) or name == JOURNAL_FILE:
                left_out.append(path.as_posix())
            else:
                files[path.as_posix()] = (folder / path).stat().st_size
        folders.sort()
    return files, left_out


def _card(folder: Path, kind: Kind, title: str) -> str:
    if kind == "dataset":
        return study_card((folder / STUDY_CARD_BODY).read_text(encoding="utf-8"), title)
    report = load_report(folder)
    assert report is not None
    return model_card(report, title)


def _upload(folder: Path, to: str, kind: Kind, files: Mapping[str, int], card: str | None, private: bool) -> str:
    """Upload files in one commit, and return its address.

    Raises:
        PruneForgeError: The Hub cannot be reached or refuses, or the repository is public and should not be.
    """
    added = [
        CommitOperationAdd(name, card.encode() if card is not None and name == CARD_FILE else str(folder / name))
        for name in files
    ]
    hub = HfApi(library_name="pruneforge")
    try:
        hub.create_repo(to, repo_type=kind, private=private or None, exist_ok=True)
        if private and not hub.repo_info(to, repo_type=kind).private:
            raise PruneForgeError(f"{to!r} exists and is public; make it private on the Hub, or name another")
        commit = hub.create_commit(to, added, commit_message="Upload a result of PruneForge", repo_type=kind)
    except PruneForgeError:
        raise
    except Exception as error:  # the Hub's client and what it sends by each raise their own
        known = isinstance(error, OfflineModeIsEnabled) or get_token()
        reason = " ".join(str(error).split())[:300].rstrip(".")
        login = "" if known else "; log in with `hf auth login`, or set HF_TOKEN"
        raise PruneForgeError(f"{to!r} cannot be pushed to: {reason}{login}") from error
    return commit.commit_url
