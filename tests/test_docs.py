"""The commands and programs in the documentation run, its links work, and its generated parts can be made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
GUIDES = [ROOT / "README.md", *DOCS]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md")), *DOCS]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_bash_and_python_block_runs(guide, tmp_path):
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    for language, file, code in re.findall(
        r"```(bash|python|yaml)(?: file=(\S+))?\n(.*?)```", guide.read_text(), re.DOTALL
    ):
        if file:
            (tmp_path / file).write_text(code)
        if file or language == "yaml":
            continue
        command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


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
