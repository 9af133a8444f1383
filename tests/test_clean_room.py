"""The wheel and a new plugin in an environment of their own, used as somebody who has no clone uses them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: object, folder: Path) -> str:
    """Run a command outside of the clone, without what this process adds to the path, and return what it prints."""
    ours = ("PYTHONPATH", "PYTHONHOME", "PRUNEFORGE_PLUGINS", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this clone."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_package_with_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(folder).as_posix()
        for folder, pattern in ((ROOT, "pruneforge/**/*.py"), (ROOT / "plugins", "**/*.py"))
        for path in folder.glob(pattern)
    }
    assert expected <= names, expected - names
    assert {"pruneforge/py.typed", "pruneforge/testing/checks.py"} <= names
    assert "pruneforge_demo/checkpoints/text/model.safetensors" in names
    packages = {path.name for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").exists()}
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"pruneforge", *packages, f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    assert not [name for name in names if "test_" in name or "__pycache__" in name]


def test_a_new_plugin_works_beside_the_wheel_in_a_fresh_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    install = (sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--quiet", "--no-deps")
    run(*install, wheel, folder=tmp_path)
    # The dependencies are this environment's. It may hold this clone as well, which its own .pth files put on the path;
    # those of a folder that a .pth file names are not read. What is installed above comes first.
    own = Path(
        run(
            binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path
        ).strip()
    )
    others = [path for path in sys.path if path.endswith("-packages")]
    assert own.is_dir()
    assert others
    (own / "dependencies.pth").write_text("\n".join(others) + "\n")

    pruneforge = binaries / "pruneforge"
    assert "wrote mine" in run(pruneforge, "new", "metric", "mine", folder=tmp_path)
    run(*install, tmp_path / "mine", folder=tmp_path)
    code = "import pruneforge, pruneforge_wanda, pruneforge_mine; print(*(m.__file__ for m in "
    code += "(pruneforge, pruneforge_wanda, pruneforge_mine)), sep='\\n')"
    files = run(binaries / "python", "-c", code, folder=tmp_path).split()
    assert len(files) == 3
    assert all(own in Path(file).parents for file in files), files

    (shown,) = json.loads(run(pruneforge, "plugins", "mine", "--json", folder=tmp_path))["registered"]
    assert (shown["kind"], shown["name"], shown["error"]) == ("metric", "mine", None)
    checked = run(pruneforge, "check", "mine", folder=tmp_path)
    passing = re.search(r"mine: (\d+) of (\d+) checks pass", checked)
    assert passing is not None, checked
    assert passing[1] == passing[2] != "0", checked
    assert " passed" in run(binaries / "python", "-m", "pytest", "-q", folder=tmp_path / "mine")

    (tmp_path / "calibration.txt").write_text("One weight after the other is looked at, and half of them go.\n" * 400)
    settings = ("--metric", "mine", "--power", "0.5", "--sparsity", "0.5", "--samples", "4", "--seqlen", "32")
    data = ("--calibration", "calibration.txt", "--output", "pruned")
    run(pruneforge, "prune", "demo:text", *settings, *data, folder=tmp_path)
    report = json.loads((tmp_path / "pruned" / "pruneforge.json").read_text())
    assert report["recipe"]["metric"] == "mine"
    assert report["sparsity"]["pruned"] * 2 == report["sparsity"]["weights"]
    assert report["plugins"]["pruneforge_mine"]["distribution"] == "pruneforge-mine"
    assert (tmp_path / "pruned" / "model.safetensors").is_file()
