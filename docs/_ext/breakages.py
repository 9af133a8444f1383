"""Name what breaks code that uses the public names, compared with the last release: `make api`.

Both trees are read, not imported, so the older one needs no environment of its own. A breakage is announced if the
`Unreleased` part of UPGRADING.md names it in backticks; one that is not announced fails the check.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import griffe

PACKAGE = "pruneforge"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Breakage:
    """One change that breaks users.

    Attributes:
        path: The public name, with the attribute below it: `Metric.score`.
        parameter: Name of the parameter that changed, or empty.
        text: What happened, in a line.
    """

    path: str
    parameter: str
    text: str

    def __str__(self) -> str:
        inside = f"({self.parameter})" if self.parameter else ""
        return f"{PACKAGE}.{self.path}{inside}: {self.text}"

    def announced_in(self, text: str) -> bool:
        """Return whether the code in a text names the path, and the parameter where there is one."""
        code = " ".join(re.findall(r"`([^`\n]+)`", text))
        return all(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code) for name in (self.path, self.parameter))


def public_names(root: Path) -> dict[str, griffe.Object]:
    """Return the public names of the tree in a folder and what they stand for.

    `__all__` is made when the package is imported; its imports for type checkers name the same.
    """
    loader = griffe.GriffeLoader(search_paths=[root], extensions=griffe.load_extensions(), allow_inspection=False)
    package = loader.load(PACKAGE, try_relative_path=False)  # not a folder of that name where the command runs
    # Not the package's members: a module takes the place of an import of its name.
    imported = {name: path for name, path in package.imports.items() if path.startswith(f"{PACKAGE}.")}
    return {name: loader.modules_collection[path] for name, path in imported.items()}


def breakages(old: Path, new: Path) -> list[Breakage]:
    """Return what breaks users of the tree in folder `old` who take the one in `new`."""
    before, after = public_names(old), public_names(new)
    listed = [Breakage(name, "", "removed") for name in before if name not in after]
    for name in before:
        if name in after:
            listed += _changes(name, before[name], after[name])
    return listed


def _changes(name: str, before: griffe.Object, after: griffe.Object) -> list[Breakage]:
    # griffe compares what modules hold, so each name gets a module of its own.
    modules = []
    for item in (before, after):
        module = griffe.Module(PACKAGE)
        module.exports = [name]
        module.members[name] = item
        modules.append(module)
    listed = []
    for change in griffe.find_breaking_changes(*modules):
        path = change.obj.path
        for item in (before, after):
            if path == item.path or path.startswith(f"{item.path}."):
                path = name + path.removeprefix(item.path)
        parameter = next((v.name for v in (change.old_value, change.new_value) if isinstance(v, griffe.Parameter)), "")
        listed.append(Breakage(path, parameter, _text(change)))
    return listed


def _text(change: griffe.Breakage) -> str:
    """Return what griffe says, but for the place."""
    kind = change.kind.value
    return kind + change.explain(griffe.ExplanationStyle("markdown")).partition(f"*{kind}*")[2]


def last_tag(repository: Path) -> str | None:
    """Return the newest tag that a repository's present state comes from."""
    command = ["git", "-C", str(repository), "describe", "--tags", "--abbrev=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _is_there(repository: Path, revision: str) -> bool:
    command = ["git", "-C", str(repository), "cat-file", "-e", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unpack(repository: Path, revision: str, folder: Path) -> None:
    """Write the package as it stood in a revision into a folder."""
    command = ["git", "-C", str(repository), "archive", revision, PACKAGE]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        # Python before 3.11.4 has no filters; the archive is git's own of this repository.
        if hasattr(tarfile, "data_filter"):
            opened.extractall(folder, filter="data")
        else:
            opened.extractall(folder)


def check(repository: Path, revision: str | None = None) -> int:
    """Print the breakages since a revision, by default the last tag; return how many are not announced."""
    revision = revision or last_tag(repository)
    if revision is not None and not _is_there(repository, revision):
        print(f"this clone does not have revision {revision}; fetch the whole history to compare the public names")
        return 0
    if revision is None:
        print("there is no tag; name the REVISION of the last release to compare the public names with")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        unpack(repository, revision, Path(folder))
        listed = breakages(Path(folder), repository)
    text = (repository / "UPGRADING.md").read_text(encoding="utf-8")
    unreleased = text.partition("## Unreleased\n")[2].partition("\n## ")[0]
    missing = [breakage for breakage in listed if not breakage.announced_in(unreleased)]
    for breakage in listed:
        print(f"{'not in UPGRADING.md: ' if breakage in missing else ''}{breakage}")
    print(f"{len(listed)} breakages of public names since {revision}, {len(missing)} of them not in UPGRADING.md")
    return len(missing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare with the revision that the command line names, or with the last tag."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(1 if check(ROOT, given[0] if given else None) else 0)


if __name__ == "__main__":
    main()
