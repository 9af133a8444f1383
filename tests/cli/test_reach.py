"""Where the Hub cannot be reached, a command says so at once, and uses what was downloaded before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from pruneforge.cli import reach


@pytest.fixture
def listener():
    reach._asked.clear()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


def test_a_host_that_takes_no_connection_is_found_out(listener):
    port = listener.getsockname()[1]
    assert reach._answers("127.0.0.1", port)
    listener.close()
    reach._asked.clear()
    assert not reach._answers("127.0.0.1", port)
    assert not reach._answers("no-such-host.invalid", 443)


def test_a_proxy_is_left_to_answer(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert not reach._has_proxy("https", "huggingface.co")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert reach._has_proxy("https", "huggingface.co")
    assert not reach._has_proxy("http", "huggingface.co")
    monkeypatch.setenv("no_proxy", "huggingface.co")
    assert not reach._has_proxy("https", "huggingface.co")


def test_a_command_tries_once_and_says_that_it_is_cut_off(listener, tmp_path):
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    cut_off = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "*"}
    asked = ["prune", "owner/name", "--metric", "magnitude", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "pruneforge", *asked], env={**os.environ, **cut_off}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("127.0.0.1 cannot be reached, so only what was downloaded before is used") == 1
    assert "Retrying" not in done.stderr
    assert "no adapter takes 'owner/name'" in done.stderr
    asked = ["eval", "demo:text", "--task", "lm-eval:sciq", "--limit", "1"]  # whose library's output is kept aside
    done = subprocess.run(
        [sys.executable, "-m", "pruneforge", *asked], env={**os.environ, **cut_off}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("127.0.0.1 cannot be reached, so only what was downloaded before is used") == 1
    assert "lm-eval cannot run sciq" in done.stderr
