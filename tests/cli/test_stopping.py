"""Signals of processes that a command has begun are their own."""

from __future__ import annotations

from pathlib import Path

import commands

FORKS = """
import os, signal
from pruneforge import hookimpl

@hookimpl
def pruneforge_run_started(run):
    child = os.fork()
    if child == 0:
        own = signal.set_wakeup_fd(-1) == -1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
"""


def test_a_forked_process_tells_nobody_of_its_signals(tmp_path: Path) -> None:
    plugin = tmp_path / "forks.py"
    plugin.write_text(FORKS)
    done = commands.run("prune", "demo:text", *commands.SETTINGS, "-p", plugin, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
