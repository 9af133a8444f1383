"""Upload the files of a folder to a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from pruneforge.checkpoint.durable import PARTIAL
from pruneforge.checkpoint.journal import JOURNAL_FILE
from pruneforge.errors import PruneForgeError
from pruneforge.runs.card import CARD_FILE

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.

    Attributes:
        name: OWNER/NAME.
        kind: What it holds.
    """

    name: str
    kind: Kind

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            PruneForgeError: It is none.
        """
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise PruneForgeError(f"{self.name!r} is not the name of a repository: {error}") from error
        if self.name.count("/") != 1:
            raise PruneForgeError(f"{self.name!r} is not the name of a repository: it needs an owner, as OWNER/NAME")

    def looked_at(self, private: bool, marks: frozenset[str]) -> tuple[set[str], str | None]:
        """Make the repository if there is none, and return its files and their commit.

        Args:
            private: Whether it is to be private; otherwise a new one is as its owner's settings say.
            marks: Names of which a repository with files must have one, or it is another's.

        Raises:
            PruneForgeError: The Hub cannot be reached or refuses, or the repository is another's, or public and should
                not be.
        """
        hub = HfApi(library_name="pruneforge")
        with self._reached():
            hub.create_repo(self.name, repo_type=self.kind, private=private or None, exist_ok=True)
            found = hub.model_info(self.name) if self.kind == "model" else hub.dataset_info(self.name)
        if private and not found.private:
            raise PruneForgeError(f"{self.name!r} exists and is public; make it private on the Hub, or name another")
        files = {file.rfilename for file in found.siblings or ()}
        others = sorted(files - {".gitattributes", CARD_FILE})
        if others and not files & marks:
            raise PruneForgeError(
                f"{self.name!r} holds {others[0]!r} and no result of PruneForge; name another repository, or a new one"
            )
        return files, found.sha

    def commit(self, files: Mapping[str, str | bytes], removed: Sequence[str], parent: str | None) -> str:
        """Upload files, and remove others, in one commit; return its address.

        Args:
            files: The content of each, or where it is, by its name.
            removed: Names of files that are there.
            parent: The commit that was looked at: one that somebody made since is not built upon.

        Raises:
            PruneForgeError: The Hub cannot be reached or refuses.
        """
        with self._reached():
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            commit = HfApi(library_name="pruneforge").create_commit(
                self.name,
                [*added, *(CommitOperationDelete(name, is_folder=False) for name in removed)],
                commit_message="Upload a result of PruneForge",
                repo_type=self.kind,
                parent_commit=parent,
            )
        return commit.commit_url

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Say in one line what the Hub refuses within the context."""
        try:
            yield
        except Exception as error:  # the Hub's client and what it sends by each raise their own
            known = isinstance(error, OfflineModeIsEnabled) or get_token()
            reason = " ".join(str(error).split())[:300].rstrip(".")
            login = "" if known else "; log in with `hf auth login`, or set HF_TOKEN"
            raise PruneForgeError(f"{self.name!r} cannot be pushed to: {reason}{login}") from error


def files_of(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of each file to upload by its name, and the names of what is left out.

    Left out are journals, locks, what begins with a dot, and links to folders or out of the folder.

    Raises:
        PruneForgeError: Something in it cannot be read.
    """
    files: dict[str, int] = {}
    left_out = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        inside = Path(place).relative_to(folder)
        for name in sorted(folders):
            if name.startswith(".") or (folder / inside / name).is_symlink():
                left_out.append(f"{(inside / name).as_posix()}/")
                folders.remove(name)
        for name in sorted(names):
            path = folder / inside / name
            hidden = name.startswith(".") or name.endswith((".lock", PARTIAL)) or name == JOURNAL_FILE
            if not hidden and not (path.is_file() and os.access(path, os.R_OK)):
                raise PruneForgeError(f"{str(path)!r} cannot be read, or is a link to nothing; mend or remove it")
            if hidden or not path.resolve().is_relative_to(folder.resolve()):
                left_out.append((inside / name).as_posix())
            else:
                files[(inside / name).as_posix()] = path.stat().st_size
        folders.sort()
    return files, left_out


def _unreadable(error: OSError) -> None:
    raise PruneForgeError(f"folder {str(error.filename)!r} cannot be read: {error.strerror}") from error
