"""`pruneforge` command lines in processes of their own.

They are forked from one process in which the libraries are imported already: importing them takes several seconds of
every test otherwise. In all else each is a process as a shell starts it, and can be killed as one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST = 600
"""Seconds that a command may take."""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["warm"])


SETTINGS = ("--metric", "wanda", "--sparsity", "0.5", "--calibration", "python-docs", "--samples", 4, "--seqlen", 64)
"""A quick `pruneforge prune`."""


def invoke(*arguments: object) -> Any:
    """Run a command in this process, and return typer's result of it."""
    from typer.testing import CliRunner

    from pruneforge.cli import app  # asks for the width of the terminal

    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


class Command:
    """A command that has begun.

    Attributes:
        pid: Number of its process.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        """Begin `pruneforge ARGUMENTS`, or a program, in a folder; `environment` is added to this process's own."""
        self.arguments = [str(argument) for argument in arguments]
        self._printed = [tempfile.NamedTemporaryFile("r", prefix="pruneforge-test-") for _ in range(2)]  # noqa: SIM115
        everything = {**os.environ, **(environment or {})}
        files = [file.name for file in self._printed]
        self._process = _SERVER.Process(
            target=_run, args=(self.arguments, code, str(folder or Path.cwd()), everything, files)
        )
        self._process.start()
        self.pid = self._process.pid

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end and return what `subprocess.run` returns."""
        self._process.join(LONGEST)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"{' '.join(self.arguments)} did not end in {LONGEST} seconds")
        stdout, stderr = (file.read() for file in self._printed)
        for file in self._printed:
            file.close()
        assert self._process.exitcode is not None
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, stdout, stderr)


def run(*arguments: object, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return Command(arguments, folder, environment).wait()


def run_program(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a folder to its end."""
    return Command([], folder, code=code).wait()


def run_together(processes: int, *arguments: object, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in several processes that share its work, with the variables that `torchrun` sets."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    size = str(processes)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", **environment}
    ranks = [Command(arguments, None, {**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(processes)]
    return [command.wait() for command in ranks]


def _run(arguments: list[str], code: str | None, folder: str, environment: dict[str, str], files: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(files, 1):
        file = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["pruneforge", *arguments]
    try:
        if code is not None:
            sys.path.insert(0, folder)
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
        else:
            from pruneforge.cli import main

            main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
