"""Every row of `bad_input.txt`: exit code 2, one line that says what and where, no traceback, nothing written."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from commands import invoke
from zoo import build

from pruneforge.plugins import loaded_plugins

TABLE = Path(__file__).with_name("bad_input.txt")
LONG = "n" * 300
DIGITS = "9" * 5_000

ROWS = [line.split(" => ") for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    build(folder)
    return folder


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for base, _, names in os.walk(folder):
        found[base] = (0, 0, 0)  # a folder that was made and removed in it has changed its time
        for name in names:
            stat = os.lstat(Path(base, name))
            found[os.path.join(base, name)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def test_the_table_is_as_long_as_promised():
    assert len(ROWS) >= 150
    assert len({command for command, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("command", "said"), ROWS, ids=[command.replace("/", "|")[:90] for command, _ in ROWS])
def test_bad_input_is_refused_in_one_line(zoo, monkeypatch, command, said):
    monkeypatch.chdir(zoo)
    before = state(zoo)
    words = shlex.split(command.replace("{long}", LONG).replace("{digits}", DIGITS))
    with monkeypatch.context() as patched:
        while re.fullmatch("[A-Z_]+=.*", words[0]):
            patched.setenv(*words.pop(0).split("=", 1))
            loaded_plugins.cache_clear()  # which are discovered once
        done = invoke(*words)
    if words != shlex.split(command):
        loaded_plugins.cache_clear()
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("pruneforge: ")
    assert said.replace("{long}", LONG).replace("{folder}", str(zoo.resolve())) in line
    assert done.stdout == ""
    assert state(zoo) == before
