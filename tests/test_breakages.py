"""What breaks users of the public names is named, compared with the last tag."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import breakages
import pruneforge

ROOT = Path(__file__).parents[1]

INIT = """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruneforge.room.metric import Metric as Metric
    from pruneforge.run import run as run
"""
METRIC = """
class Base:
    def describe(self): ...

class Metric(Base):
    def score(self, layer, stats): ...
    def _inner(self, layer): ...
"""
RUN = "def run(model, sparsity=0.5, *, seed=0): ...\ndef internal(model): ...\n"


def write(root: Path, init: str = INIT, metric: str = METRIC, run: str = RUN) -> Path:
    package = root / "pruneforge"
    (package / "room").mkdir(parents=True, exist_ok=True)
    for path, text in {"__init__": init, "room/__init__": "", "room/metric": metric, "run": run}.items():
        (package / f"{path}.py").write_text(text)
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path) -> Path:
    root = write(tmp_path / "repository")
    (root / "UPGRADING.md").write_text("# Upgrading\n\n## Unreleased\n\n## 0.1.0\n\n- `run` takes no `seed`.\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "First")
    return root


def test_the_public_names_are_seen_without_importing_the_package():
    assert sorted(breakages.public_names(ROOT)) == pruneforge.__all__


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": RUN.replace("seed=0", "seeds=0")}, "run(seed): Parameter was removed"),
        ({"run": RUN.replace("sparsity=0.5", "sparsity")}, "run(sparsity): Parameter is now required"),
        ({"run": "run = 3\n"}, "run: Public object points to a different kind of object"),
        ({"metric": METRIC.replace("score", "scores")}, "Metric.score: Public object was removed"),
        ({"metric": METRIC.replace("describe", "tell")}, "Metric.describe: Public object was removed"),
        ({"metric": METRIC.replace("stats)", "stats, mask)")}, "Metric.score(mask): Parameter was added as required"),
        ({"init": INIT.replace("import run as run", "import internal as internal")}, "run: removed"),
    ],
)
def test_a_breakage_is_named_by_its_public_name(changes, said, tmp_path):
    listed = breakages.breakages(write(tmp_path / "old"), write(tmp_path / "new", **changes))
    assert len(listed) == 1
    assert str(listed[0]).startswith(f"pruneforge.{said}")


def test_what_breaks_nobody_is_not_named(tmp_path):
    moved = INIT.replace("pruneforge.run ", "pruneforge.room.run ")
    old = write(tmp_path / "old")
    new = write(tmp_path / "new", moved, METRIC.replace("_inner", "_other"), "")
    (new / "pruneforge" / "room" / "run.py").write_text("def run(model, sparsity=0.5, more=1, *, seed=0): ...\n")
    assert breakages.breakages(old, new) == []


def test_the_last_tag_is_compared_and_a_breakage_has_to_be_announced(repository, capsys):
    git(repository, "tag", "v0.1.0")
    assert breakages.check(repository) == 0
    write(repository, run=RUN.replace(", *, seed=0", ""))
    assert breakages.check(repository) == 1
    assert "not in UPGRADING.md: pruneforge.run(seed): Parameter was removed" in capsys.readouterr().out
    page = repository / "UPGRADING.md"
    page.write_text(page.read_text().replace("## Unreleased\n", "## Unreleased\n\n- `run` has no `seed`.\n"))
    assert breakages.check(repository) == 0
    assert "1 breakages of public names since v0.1.0, 0 of them not in UPGRADING.md" in capsys.readouterr().out


def test_a_clone_without_a_tag_is_told_so(repository, capsys):
    assert breakages.check(repository) == 0
    assert "there is no tag; name the REVISION of the last release" in capsys.readouterr().out
    assert breakages.check(repository, "0123456") == 0
    assert "does not have revision 0123456" in capsys.readouterr().out
