"""What commands show: on a terminal and in a pipe, in colours and without, as tables and JSON; names as they are."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import commands
import pytest
import torch
from commands import invoke
from safetensors import safe_open
from safetensors.torch import save_file
from typer.main import get_command

import pruneforge
from pruneforge.cli import app
from pruneforge.wide_products import is_fast

MARKUP = "a[/b][bold]c:smile:"


def printed(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does, where nothing says how wide a terminal is."""
    left = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "pruneforge", *map(str, arguments)]
    return subprocess.run(command, env={**left, **environment}, capture_output=True, text=True, check=False)


def on_a_terminal(*arguments: object, **environment: str) -> str:
    """Return what a command prints on a terminal of 200 columns."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "pruneforge", *map(str, arguments)]
    running = subprocess.Popen(
        command, env={**os.environ, "TERM": "xterm", **environment}, stdin=other, stdout=other, stderr=other
    )
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 1 << 16)
        except OSError:  # as Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert running.wait() == 0, shown.decode()
    return shown.decode()


def test_a_terminal_shows_our_bars_alone_and_quiet_none(checkpoint):
    asked = ("eval", checkpoint, "--task", "perplexity", "--data", "python-docs", "--limit", 8, "--batch-size", 1)
    bars = {"HF_HUB_DISABLE_PROGRESS_BARS": "", "PRUNEFORGE_QUIET": ""}
    shown = on_a_terminal(*asked, **bars)
    assert re.search(r"perplexity.*\d/8.*left", shown)
    assert "Loading weights" not in shown
    quiet = on_a_terminal(*asked, "--quiet", **bars)
    assert "left" not in quiet
    assert "Loading weights" not in quiet
    assert re.search(r"perplexity\s*│\s*[0-9.]+", quiet)


def test_tables_are_whole_in_a_pipe_and_without_colours_where_asked():
    done = printed("plugins", "perplexity", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert "\x1b[" not in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("│ window ")]
    assert "tokens a window; by default the context, at most 2048" in row
    assert "…" not in done.stdout
    coloured = on_a_terminal("plugins", "perplexity", COLUMNS="200")
    assert "\x1b[" in coloured
    assert "\x1b[3" not in on_a_terminal("plugins", "perplexity", COLUMNS="200", NO_COLOR="1")


def test_a_shell_is_given_what_completes_a_word():
    asked = {"_PRUNEFORGE_COMPLETE": "complete_bash", "COMP_WORDS": "pruneforge pr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [shutil.which("pruneforge", path=os.path.dirname(sys.executable)) or "pruneforge"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["prune"], done.stderr


def test_the_help_groups_options_and_shows_plain_types():
    for name in get_command(app).commands:
        text = invoke(name, "--help").output
        assert "range>" not in text, name
        assert "INTEGER RANGE" not in text, name
        assert "Examples" in text, name
    text = invoke("prune", "--help").output
    places = [
        text.index(f"─ {panel} ─") for panel in ("Method", "Calibration", "Model", "Output", "Resources", "Other")
    ]
    assert places == sorted(places)


def test_every_command_that_prints_a_table_prints_json_too():
    without = {"new"}  # which prints what to do next
    for name, command in get_command(app).commands.items():
        flags = {flag for option in command.params for flag in option.opts}
        assert ("--json" in flags) == (name not in without), name


def test_cells_of_a_study_are_counted_in_json(tmp_path):
    asked = ("demo:image", "--metric", "magnitude", "--sparsity", 0.5, "--task", "imagenet", "--data", "digits")
    more = ("--limit", 8, "--seeds", 0, "--no-controls", "--output", tmp_path / "out", "--json")
    done = invoke("compare", *asked, *more, "--cells", "1/1")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"finished": 1, "failed": 0, "cells": 1}


def test_doctor_says_what_is_not_there_in_words():
    text = invoke("doctor").stdout
    assert re.search(r"accelerators\s*│\s*\w", text)
    assert not re.search(r"│ (\[\]|True|False|None) +│", text)
    assert re.search(r"bfloat16 on the CPU\s*│ yes ", text)
    assert re.search(rf"bfloat16 products\s*│ {'fast' if is_fast(torch.bfloat16) else 'slow on this CPU'}", text)


def test_a_name_that_looks_like_markup_is_shown_as_it_is(checkpoint, tmp_path):
    out = tmp_path / "out"
    pruneforge.prune(checkpoint, "magnitude", 0.5, output=out)
    masks = out / "pruneforge.masks"
    with safe_open(masks, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = next(iter(json.loads(metadata["shapes"])))
    renamed = {name.replace(old, MARKUP): tensor for name, tensor in tensors.items()}
    shapes = {name.replace(old, MARKUP): shape for name, shape in json.loads(metadata["shapes"]).items()}
    save_file(renamed, masks, {**metadata, "shapes": json.dumps(shapes)})
    report = json.loads((out / "pruneforge.json").read_text())
    report["layers"] = {name.replace(old, MARKUP): layer for name, layer in report["layers"].items()}
    (out / "pruneforge.json").write_text(json.dumps(report))
    shown = invoke("inspect", out, "--layers")
    assert shown.exit_code == 0, shown.exception
    assert MARKUP in shown.stdout


def test_the_time_that_recover_prints_includes_loading(checkpoint, tmp_path):
    pruneforge.prune(checkpoint, "magnitude", 0.5, output=tmp_path / "pruned")
    data = ("--calibration", "python-docs", "--samples", 2, "--seqlen", 16)
    asked = ("recover", tmp_path / "pruned", "--with", "perp", *data, "--steps", 2, "--output", tmp_path / "out")
    done = commands.run(*asked, PRUNEFORGE_QUIET="")
    assert done.returncode == 0, done.stderr
    seconds = pruneforge.load(tmp_path / "out").report["measured"]["recovered"][-1]["seconds"]
    waited = sum(seconds[stage] for stage in ("load", "data", "recover"))
    assert f"in {waited:.1f} s; wrote" in done.stdout
    stages = [line.split("] ")[1] for line in done.stderr.strip().splitlines() if line.startswith("[")]
    assert stages == ["loading the model", "reading calibration data, 0", "steps of perp, 0 of 2"]


def test_an_interrupted_apply_says_how_to_go_on(checkpoint, tmp_path):
    pruneforge.prune(checkpoint, "magnitude", 0.5, output=tmp_path / "pruned")
    observer = tmp_path / "interrupt.py"
    observer.write_text(
        "import os, signal\nfrom pruneforge import hookimpl\n"
        "@hookimpl\ndef pruneforge_register(registry): pass\n"
        "@hookimpl\ndef pruneforge_block_pruned(result):\n"
        "    if result.index == 2:\n        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    out = tmp_path / "out"
    done = commands.run("apply", tmp_path / "pruned", checkpoint, "-p", observer, "--output", out)
    assert done.returncode == 130
    assert done.stderr.strip() == f"pruneforge: interrupted; {out} holds what is finished, go on with --resume"


@pytest.mark.parametrize("command", ["inspect", "eval", "apply", "push"])
def test_a_plugin_file_in_a_recipe_is_loaded_by_no_command(command, checkpoint, tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "recipe.yaml").write_text(f"plugins: [{tmp_path / 'mine.py'}]\n")
    arguments = {
        "inspect": [checkpoint],
        "eval": [checkpoint, "--task", "perplexity", "--data", "python-docs"],
        "apply": [checkpoint, checkpoint, "--output", tmp_path / "out"],
        "push": [checkpoint, "--to", "a/b"],
    }
    done = invoke(command, *arguments[command], "--config", tmp_path / "recipe.yaml")
    assert done.exit_code == 2
    assert "names the plugin file" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_the_gradient_cache_of_a_model_in_memory_says_why_it_does_not_work(checkpoint):
    with pytest.raises(pruneforge.PruneForgeError, match=r"gradient cache needs a model that is streamed"):
        pruneforge.prune(
            checkpoint, "gblm", 0.5, calibration="python-docs", samples=2, seqlen=16, gradient_cache="anywhere"
        )
