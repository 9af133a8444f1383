"""The commands and programs in the documentation run, its links work, and its generated parts can be made."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
GUIDES = [ROOT / "README.md", *DOCS]
LONG = {"compare", "method", "next", "prune", "tutorial"}
"""Pages whose programs take twenty seconds and more; `make test-all` runs them too."""
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md")), *DOCS]


def check_block(language: str, code: str, folder: Path) -> None:
    """Run what a reader would type, a command after the other; those of ours in processes that are forked."""
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    lines = code.replace("\\\n", " ").splitlines() if language == "bash" else [code]
    simple = all(re.match(r"pruneforge [^|>&$`;]*$|\s*(#.*)?$", line) for line in lines)
    if language == "bash" and not simple:
        lines = [code]
    for line in lines:
        if language == "python":
            done = commands.run_program(line, folder)
        elif simple:
            words = shlex.split(line, comments=True)
            done = commands.run(*words[1:], folder=folder) if words else None
        else:
            command = ["bash", "-euc", line]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done is None or done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def little_demo_text(gradient_cache, little_text):
    """A part of the demo's text for the commands of the pages: what they compute is not looked at."""
    (gradient_cache / "python-docs").unlink()
    (gradient_cache / "python-docs").symlink_to(little_text)


@pytest.mark.parametrize(
    "guide",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in LONG else page for page in GUIDES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_bash_and_python_block_runs(guide, tmp_path, little_demo_text):
    blocks = re.findall(r"```(bash|python|yaml)(?: file=(\S+))?\n(.*?)```", guide.read_text(), re.DOTALL)
    for language, file, code in blocks:
        if file:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(code)
        elif language != "yaml":
            check_block(language, code, tmp_path)


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_map_shows_the_files_that_there_are():
    import filemap

    assert filemap.PAGE.read_text() == filemap.expected(), "run python docs/_ext/filemap.py"
    for path in filemap.named_paths():
        assert (ROOT / path).exists(), path


def test_the_generated_parts_can_be_made():
    import pages

    for page in DOCS:
        assert "{generated}" not in pages.expand(page.read_text()), page


def test_the_reference_documents_every_public_name():
    import pages

    assert not list(pages.api_problems())


def test_the_table_of_architectures_is_that_of_the_tests():
    import supported

    assert supported.PAGE.read_text() == supported.table(), "run python tests/supported.py"


SOURCE = """
'''A module.'''

import os
from sys import (
    path,
)


@property
class One(
    object
):
    '''Text

    more.'''

    # why
    x = '''a
    b'''
    'about x'

def two():  # says
    import re

    return (
        1,
    )
"""


def test_the_page_of_code_lines_counts_the_code_that_there_is():
    import codelines

    source = SOURCE.replace("'", '"')
    assert codelines.code_lines(source) == 10  # 6 of the class with its decorator, 4 of the function
    assert codelines.code_lines(source, ["One"]) == 6
    assert codelines.PAGE.read_text() == codelines.page(), "run python docs/_ext/codelines.py"
    beyond = {name for name, lines in codelines.method_lines().items() if lines > codelines.AIMS[name]}
    assert beyond == codelines.WHY.keys()  # the page says of each by how much, and why


def test_no_page_installs_the_other_project_of_this_name():
    pages = [*GUIDES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile"))]
    pages += [*(ROOT / ".github").rglob("*.*"), *(ROOT / "pruneforge").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    assert len(pages) > 50
    for page in pages:
        for line in page.read_text().splitlines():
            for command in re.findall(r"(?:pip3?|uv|pipx) (?:install|add)\b[^`]*", line):
                assert not re.search(r"[\s'\"]pruneforge(?![-\w/])", command), f"{page.name}: {line}"
