"""Damaged and forged files: read, or refused with a `PruneForgeError`; never anything else, never for long.

`make fuzz` tries many more examples than `make test-all`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from conftest import CHECKPOINT, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from zoo import METHODS, MODELS

import pruneforge
from pruneforge import Checkpoint, PruneForgeError
from pruneforge.checkpoint.journal import Journal, line_of
from pruneforge.runs.card import model_card
from pruneforge.runs.recipe_file import read_config
from pruneforge.runs.report_file import load_report
from pruneforge.studies.compare import read_study
from pruneforge.studies.plan import cells_of

pytestmark = pytest.mark.slow

fuzzed = settings(
    max_examples=int(os.environ.get("PRUNEFORGE_FUZZ", "100")),
    deadline=timedelta(seconds=2),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

HANGS = 20
"""Seconds after which an example is ended."""

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63), 2**70, 10**400, 0, -1])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../x", "/etc/passwd", "\ud800", "a" * 300, "\0", "2:4", "nan", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """Bytes with some cut, inserted, repeated or replaced."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(made)))
        stop = min(len(made), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "insert", "repeat", "replace", "end"]))
        if kind == "cut":
            del made[start:stop]
        elif kind == "insert":
            made[start:start] = draw(st.binary(max_size=20))
        elif kind == "repeat":
            made[start:start] = made[start:stop]
        elif kind == "replace":
            made[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        else:
            del made[start:]
    return bytes(made)


@st.composite
def mutated_values(draw: Callable[..., Any], value: Any) -> Any:
    """A value of JSON with something in it replaced, left out or added."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: draw(mutated_values(value[key]))}
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        left = {name: item for name, item in value.items() if name != key}
        return left if draw(st.booleans()) else {**left, draw(st.text(max_size=8)): value[key]}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(mutated_values(value[index])), *value[index + 1 :]]
    return draw(VALUES)


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """The output of a run on a tiny model of several files."""
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_llama(torch.float32).save_pretrained(folder / "model", max_shard_size="100KB")
    pruneforge.prune(folder / "model", "magnitude", 0.5, output=folder / "pruned")
    return folder / "pruned"


@pytest.fixture
def place(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "here" / "pruned"))


def check_refused(work: Callable[[], object], inside: Path) -> bool:
    """Do something that may be refused, and must write nowhere but in a folder; return whether it was done."""
    before, said = beside(inside), ""
    try:
        with ended_after(HANGS):
            work()
    except PruneForgeError as error:
        said = str(error)
    assert "\n" not in said
    assert beside(inside) == before
    return not said


def beside(inside: Path) -> dict[Path, int]:
    """Return what is around a folder, where names such as `../x` lead, with the time of its last change."""
    around = inside.parent.parent
    return {path: path.lstat().st_mtime_ns for path in around.rglob("*") if inside not in (path, *path.parents)} | {
        around: around.lstat().st_mtime_ns
    }


@contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    """Fail in the middle of what never ends, which a deadline that is looked at afterwards does not."""

    def fail(number: int, frame: object) -> None:
        raise AssertionError(f"it did not end in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def holding(file: Path, forged: bytes) -> Iterator[None]:
    """Have other bytes in a file within the context, whatever happens there: the next example finds the true ones."""
    content = file.read_bytes()
    file.write_bytes(forged)
    try:
        yield
    finally:
        file.write_bytes(content)


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and what follows it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@given(data=st.data())
@fuzzed
def test_headers(data, place):
    file = place / Checkpoint(place).files[0]
    content = file.read_bytes()
    header, rest = parts_of(content)
    text = as_bytes(data.draw(mutated_values(header)))
    forged = len(text).to_bytes(8, "little") + text + rest
    with holding(file, data.draw(st.just(forged) | mutated_bytes(content))):
        check_refused(lambda: Checkpoint(place).fingerprint(), place)


@given(data=st.data())
@fuzzed
def test_indexes(data, place):
    file = place / "model.safetensors.index.json"
    content = file.read_bytes()
    forged = as_bytes(data.draw(mutated_values(json.loads(content))))
    with holding(file, data.draw(st.just(forged) | mutated_bytes(content))):
        check_refused(lambda: Checkpoint(place).fingerprint(), place)


@given(data=st.data())
@fuzzed
def test_what_is_pruned_is_read_by_the_library(data, place):
    """A model of forged weights or index is refused, or its output is one that safetensors opens."""
    index = data.draw(st.booleans())
    file = place / ("model.safetensors.index.json" if index else Checkpoint(place).files[0])
    content, out = file.read_bytes(), place.parent / "out"
    if index:
        forged = as_bytes(data.draw(mutated_values(json.loads(content))))
    else:
        header, rest = parts_of(content)
        text = as_bytes(data.draw(mutated_values(header)))
        forged = len(text).to_bytes(8, "little") + text + rest
    out.mkdir(exist_ok=True)
    with holding(file, forged):
        done = check_refused(lambda: pruneforge.prune(place, "magnitude", 0.25, output=out), out)
    assert any(out.iterdir()) is done
    for made in out.glob("*.safetensors"):
        with safe_open(made, "pt") as opened:
            assert all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118
    for made in out.iterdir():
        made.unlink()


@given(data=st.data())
@fuzzed
def test_masks(data, place):
    file = place / "pruneforge.masks"
    content = file.read_bytes()
    header, rest = parts_of(content)
    shapes = json.dumps(data.draw(mutated_values(json.loads(header["__metadata__"]["shapes"]))))
    text = as_bytes({**header, "__metadata__": {**header["__metadata__"], "shapes": shapes}})
    forged = len(text).to_bytes(8, "little") + text + rest
    with holding(file, data.draw(st.just(forged) | mutated_bytes(content))):
        check_refused(lambda: pruneforge.inspect(place), place)


@given(data=st.data())
@fuzzed
def test_reports(data, place):
    file = place / "pruneforge.json"
    content = file.read_bytes()
    forged = as_bytes(data.draw(mutated_values(json.loads(content))))

    def read() -> None:
        report = load_report(place)
        assert report is not None
        model_card(report, "a title")
        pruneforge.inspect(place)
        pruneforge.diff(place, place)

    with holding(file, data.draw(st.just(forged) | mutated_bytes(content))):
        check_refused(read, place)


@given(data=st.data())
@fuzzed
def test_journals(data, place):
    identity = {"recipe": {"model": "x", "sparsity": 0.5}, "model": {"fingerprint": "abc"}}
    content = (
        line_of({"format": 2, **identity}) + line_of({"prepared": True}) + line_of({"block": 0, "pruned": {"a": 5}})
    )
    file = place / "journal.jsonl"
    file.write_bytes(data.draw(mutated_bytes(content)))

    def read() -> None:
        journal = Journal(place, identity, resume=True)
        assert all(isinstance(entry, dict) for entry in journal.entries)
        journal.close()

    try:
        check_refused(read, place)
    finally:
        file.unlink()


RECIPE = {
    "model": "./nowhere",
    "metric": "wanda",
    "sparsity": 0.5,
    "options": {"scope": "row"},
    "exclude": ["a*"],
    "seed": 1,
}


@given(data=st.data())
@fuzzed
def test_recipes(data, place):
    file = place / "recipe.yaml"
    valid = as_bytes({**RECIPE, "samples": 4, "seqlen": 16, "refine": ["dsnot"], "streams": {"a": "c4"}})
    forged = as_bytes(data.draw(mutated_values(json.loads(valid))))
    file.write_bytes(data.draw(st.just(forged) | mutated_bytes(valid)))
    check_refused(lambda: read_config(file), place)
    done = invoke("prune", "./nowhere", "--metric", "wanda", "--config", file, "--output", place / "out")
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (place / "out").exists()


@given(data=st.data())
@fuzzed
def test_studies(data, place):
    import yaml

    file = place / "study.yaml"
    valid = MODELS.replace("model: model", f"model: {CHECKPOINT}") + METHODS + 'patterns: [0.5, "2:4"]\nseeds: [0]\n'
    forged = as_bytes(data.draw(mutated_values(yaml.safe_load(valid))))
    file.write_bytes(data.draw(st.just(forged) | mutated_bytes(valid.encode())))
    check_refused(lambda: cells_of(read_study(file), []), place)
