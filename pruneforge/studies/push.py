"""`pruneforge.push`: upload a result to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pruneforge.checkpoint.journal import JOURNAL_FILE
from pruneforge.errors import PruneForgeError
from pruneforge.runs.card import CARD_FILE, model_card, study_card
from pruneforge.runs.hub import Kind, Repository, files_of
from pruneforge.runs.places import STUDY_FILE
from pruneforge.runs.report_file import REPORT_FILE, load_report
from pruneforge.studies.compare import read_study
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.plan import cells_of
from pruneforge.studies.report import MARKDOWN_FILE, RESULTS_FILE

MARKS = frozenset({REPORT_FILE, STUDY_FILE})
"""Files by which a repository is known to hold a result."""

WEIGHTS = (".safetensors", ".bin", ".index.json")
"""Endings of files that loaders may prefer to a new result's: those of an earlier one must not stay."""


def push(folder: str | Path, to: str, *, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Upload a pruned model, or the folder of a study, to the Hub, in one commit.

    A folder without a README.md gets a card that is made from its report, unless the repository has one; the folder
    itself stays as it is. Journals, locks, files and folders whose names begin with a dot, and links to folders or out
    of the folder are left out. Of a result that the repository has, files of the same names are replaced, and other
    weights removed.

    Args:
        folder: The output of a pruning run, or the folder of a study.
        to: The repository, as OWNER/NAME. A model's is of the kind model, a study's of the kind dataset.
        private: Whether the repository is to be private; otherwise a new one is as its owner's settings say.
        dry_run: Whether to only say what would be uploaded, which needs neither network nor token.

    Returns:
        `repository`, `kind` ("model" or "dataset"), `files` (bytes of each, by name), `left_out` (names), `card` (the
        card's text, or `None` if the folder or the repository has one), `removed` (names of the repository's) and `url`
        (of the commit, or `None`).

    Raises:
        PruneForgeError: The folder holds no finished result, or something that cannot be read; the repository's name is
            none, it holds something else than a result, it is public where a private one is asked for, or the Hub
            cannot be reached or refuses.
    """
    path = Path(folder)
    kind = _kind(path)
    repository = Repository(to, kind)
    files, left_out = files_of(path)
    card = None if CARD_FILE in files else _card(path, kind, to.rpartition("/")[2])
    if card is not None:
        files = {CARD_FILE: len(card.encode()), **files}
    pushed = {"repository": to, "kind": kind, "files": files, "left_out": left_out, "card": card}
    if dry_run:
        return pushed | {"removed": [], "url": None}
    there, commit = repository.looked_at(private, MARKS)
    contents: dict[str, str | bytes] = {name: str(path / name) for name in files}
    if card is not None and CARD_FILE in there:
        pushed["card"] = None
        del files[CARD_FILE], contents[CARD_FILE]
    elif card is not None:
        contents[CARD_FILE] = card.encode()
    removed = sorted(name for name in there - set(files) if name.endswith(WEIGHTS))
    return pushed | {"removed": removed, "url": repository.commit(contents, removed, commit)}


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
        _check_finished(folder)
        return "dataset"
    inner = sorted(path.parent for path in folder.glob(f"*/{REPORT_FILE}"))
    if inner:
        raise PruneForgeError(f"{str(folder)!r} holds several runs; push one of them, such as {str(inner[0])!r}")
    raise PruneForgeError(f"{str(folder)!r} is the output of neither a pruning run nor a study")


def _check_finished(folder: Path) -> None:
    """Raise if a study's report is not of all its cells; one that an earlier, smaller study left does not count.

    Raises:
        PruneForgeError: Naming a cell.
    """
    held, results = StudyFolder(folder), folder / RESULTS_FILE
    written = results.is_file() and (folder / MARKDOWN_FILE).is_file()
    rows = json.loads(results.read_text(encoding="utf-8")) if written else []
    told = {(row["model"], row["method"], row["pattern"], row["seed"]) for row in rows}
    for cell in cells_of(read_study(folder / STUDY_FILE), []):
        place = cell.model, cell.method, str(cell.pattern), cell.seed
        if held.cell(cell) is None or place not in told:
            raise PruneForgeError(
                f"{str(folder)!r} holds an unfinished study: its report lacks {cell.key!r}; run it again, with all "
                "cells, before it is pushed"
            )


def _card(folder: Path, kind: Kind, title: str) -> str:
    if kind == "dataset":
        return study_card((folder / MARKDOWN_FILE).read_text(encoding="utf-8"), title)
    report = load_report(folder)
    assert report is not None
    return model_card(report, title)
