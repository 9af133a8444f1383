"""Text sources: what they read, what they draw, and what they say when it is not enough."""

from __future__ import annotations

import json
import random

import datasets
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.interfaces.source import Request, create_source
from pruneforge.plugins import loaded_plugins

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards vex bold mice".split()


@pytest.fixture(scope="session")
def tokenizer():
    from conftest import CHECKPOINT

    return AutoTokenizer.from_pretrained(CHECKPOINT)


def documents(count: int = 12, seed: int = 0) -> list[str]:
    """Documents of very different lengths."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=10 + 25 * i)) for i in range(count)]


def source(data, **options):
    return create_source(data, options, loaded_plugins().registry)


def draw(data, tokenizer, samples=8, seqlen=32, seed=0, batch_size=3, **options):
    request = Request(tokenizer, samples, seqlen, batch_size, seed)
    batches = list(source(data, **options).calibration(request))
    assert all(len(batch["input_ids"]) <= batch_size for batch in batches)
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.fixture
def rows(tmp_path):
    """The same documents as JSON lines, as Parquet, and as a folder that `datasets` reads."""
    texts = documents()
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(parquet)
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(jsonl.read_text())
    coded = tmp_path / "coded.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), coded)
    return {"coded": str(coded), "jsonl": str(jsonl), "parquet": str(parquet), "hub": f"hub:{folder}"}


def test_the_same_rows_give_the_same_samples_whatever_the_format(rows, tokenizer):
    drawn = [draw(rows[kind], tokenizer) for kind in ("jsonl", "parquet", "coded", "hub")]
    assert drawn[0].shape == (8, 32)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_crops_are_those_of_the_authors_code(rows, tokenizer):
    texts, expected = documents(), []
    random.seed(5)
    for _ in range(8):  # as in the authors' get_c4
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            if ids.shape[1] > 32:
                break
        i = random.randint(0, ids.shape[1] - 32 - 1)
        expected.append(ids[:, i : i + 32])
    assert torch.equal(draw(rows["jsonl"], tokenizer, seed=5), torch.cat(expected))


def test_packing_draws_without_replacement(rows, tokenizer):
    drawn = draw(rows["jsonl"], tokenizer, samples=20, pack=True)
    assert len({tuple(row.tolist()) for row in drawn}) == 20
    stream = torch.cat([torch.tensor(tokenizer(text).input_ids) for text in documents()])
    windows = {tuple(row.tolist()) for row in stream[: len(stream) // 32 * 32].view(-1, 32)}
    assert {tuple(row.tolist()) for row in drawn} <= windows


def test_a_plain_file_is_one_document_and_can_be_sliced(tmp_path, tokenizer):
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {i}\n" for i in range(10)))
    assert source(f"{file}").documents("evaluation") == [file.read_text()]
    first, second = source(f"{file}[:70%]"), source(f"{file}[70%:]")
    assert first.documents("calibration")[0] + second.documents("evaluation")[0] == file.read_text()
    assert source(f"{file}[2:4]").documents("calibration") == ["line 2\nline 3\n"]


def test_slices_take_rows(rows):
    assert source(f"{rows['jsonl']}[:25%]").documents("calibration") == documents()[:3]
    assert source(f"{rows['parquet']}[10:]").documents("calibration") == documents()[10:]
    assert source(f"{rows['hub']}[1:3]").documents("calibration") == documents()[1:3]


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_pinned_sources_are_read_through_datasets(name, tmp_path, monkeypatch, tokenizer):
    """The pinned location is swapped for a local folder of the same layout; everything else is real."""
    column = "sentence" if name == "ptb" else "text"
    for split in ("train", "validation", "test"):
        texts = documents(seed=len(split))
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({column: t}) + "\n" for t in texts))
    chosen = source(name)
    pinned = {part: chosen.location(part) for part in ("calibration", "evaluation")}
    assert all("/" in location["path"] and "trust_remote_code" not in location for location in pinned.values())
    assert pinned["calibration"]["split"] == "train"
    assert pinned["evaluation"]["split"] != "train"
    monkeypatch.setattr(
        type(chosen), "location", lambda self, part: {"path": str(tmp_path), "split": pinned[part]["split"]}
    )
    assert draw(name, tokenizer).shape == (8, 32)
    joined = " ".join(documents(seed=len("train")))
    assert list(chosen.documents("calibration")) == (documents(seed=len("train")) if name == "c4" else [joined])
    assert list(chosen.documents("evaluation")) == documents(seed=len(pinned["evaluation"]["split"]))


def test_the_demos_three_parts_share_no_paragraph():
    from pruneforge_demo import corpus

    parts = {}
    for part in ("training", "calibration", "evaluation"):
        texts = corpus.documents(part)
        assert len(texts) > 20
        parts[part] = {" ".join(p.split()) for text in texts for p in text.split("\n\n")}
    assert not parts["training"] & parts["calibration"]
    assert not parts["training"] & parts["evaluation"]
    assert not parts["calibration"] & parts["evaluation"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library in place of Python's own, and a way to read it as a new process would."""
    from pruneforge_demo import corpus

    folder = tmp_path / "library"
    for name in ("a", "b/c", "pydoc_data/topics", "site-packages/other"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(f'"""{name}\n\n{" ".join(documents(seed=len(name)))}"""\n')
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setenv("PRUNEFORGE_CACHE", str(tmp_path / "cache"))

    def read():
        for cached in (corpus.documents, corpus._parts):
            cached.cache_clear()
        return [corpus.documents(part) for part in ("training", "calibration", "evaluation")]

    yield folder, read
    for cached in (corpus.documents, corpus._parts):
        cached.cache_clear()


def test_the_demos_text_is_parsed_once_for_all_processes(library, monkeypatch):
    from pruneforge_demo import corpus

    folder, read = library
    parsed = read()
    assert sum(text.startswith(("a\n", "b/c\n")) for part in parsed for text in part) == 2
    assert not any("site-packages" in text for part in parsed for text in part)
    written = corpus.cache_file().read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(corpus, "_parse", None)
        assert read() == parsed
    # Another library, or another Python, is another matter.
    (folder / "a.py").write_text((folder / "a.py").read_text().replace("quick", "speedy"))
    changed = read()
    assert changed != parsed
    assert corpus.cache_file().read_bytes() != written
    monkeypatch.setattr(corpus.sys, "version", "4.0")
    written = corpus.cache_file().read_bytes()
    assert read() == changed
    assert corpus.cache_file().read_bytes() != written


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: content.replace(b"lazy", b"busy"),
        lambda content: content.partition(b"\n")[0],
        lambda content: b"[]\n{}",
        lambda content: b"\xff\xfe" + content,
    ],
)
def test_a_damaged_cache_of_the_demos_text_is_seen_and_mended(damage, library):
    from pruneforge_demo import corpus

    _, read = library
    parsed, file = read(), corpus.cache_file()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert read() == parsed
    assert file.read_bytes() == whole


def test_the_demos_text_needs_no_cache(library, tmp_path, monkeypatch):
    from pruneforge_demo import corpus

    _, read = library
    parsed = read()
    monkeypatch.setenv("PRUNEFORGE_CACHE", str(tmp_path / "library" / "a.py"))  # no folder, and cannot become one
    assert read() == parsed
    monkeypatch.setenv("PRUNEFORGE_CACHE", str(tmp_path / "full"))
    with monkeypatch.context() as patched:
        patched.setattr(corpus.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert read() == parsed
    assert list((tmp_path / "full" / "python-docs").iterdir()) == []
    monkeypatch.setattr(corpus.Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert read() == parsed


def test_the_demos_text_is_kept_in_the_users_cache(monkeypatch, tmp_path):
    from pruneforge_demo import corpus

    monkeypatch.delenv("PRUNEFORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus.cache_file().parent == tmp_path / "pruneforge" / "python-docs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert corpus.cache_file().parent == tmp_path / "me" / ".cache" / "pruneforge" / "python-docs"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.txt", "\n\n  \n", "holds no text"),
        ("short.txt", "a few words", "no document longer than 32 tokens"),
        ("empty.jsonl", "", "holds no rows"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "line 2"),
        ("other.jsonl", '{"content": "a"}\n', "column=NAME"),
        ("notes.xyz", "text", "no source reads"),
    ],
)
def test_text_that_is_not_enough_is_named(tmp_path, tokenizer, name, content, said):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(PruneForgeError) as error:
        draw(file, tokenizer)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_samples_that_would_repeat_one_another_are_refused(tmp_path, tokenizer):
    file = tmp_path / "one.txt"
    file.write_text(documents()[-1])
    with pytest.raises(PruneForgeError, match=r"tokens in documents longer than 32, too little for 100 samples"):
        draw(file, tokenizer, samples=100)


def test_brackets_in_a_name_and_line_separators_in_a_text_are_taken_as_they_are(tmp_path):
    file = tmp_path / "part[1].txt"
    file.write_text("one\ntwo\n")
    assert source(f"{file}[:1]").documents("calibration") == ["one\n"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n')
    assert source(rows).documents("calibration") == ["a\u2028b", "c"]
    rows.write_text('{"text": null}\n')
    with pytest.raises(PruneForgeError, match="line 1 of"):
        source(rows).documents("calibration")


def test_too_few_windows_are_counted(rows, tokenizer):
    with pytest.raises(PruneForgeError, match=r"tokens, \d+ samples of 32, and 5000 were asked for"):
        draw(rows["jsonl"], tokenizer, samples=5000, pack=True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("wikitex2", "did you mean 'wikitext2'"),
        ("missing.txt", "no file or folder 'missing.txt'"),
        ("hub:nobody/nothing", "source 'hub' cannot be loaded"),
        ("c4:en", "takes no argument"),
    ],
)
def test_sources_that_are_not_there_are_named(data, said, tokenizer):
    with pytest.raises(PruneForgeError) as error:
        draw(data, tokenizer)
    assert said in str(error.value)


def test_a_wrong_column_and_a_wrong_slice_are_named(rows, tmp_path, tokenizer):
    with pytest.raises(PruneForgeError, match="no column 'body'; it has text"):
        draw(rows["hub"], tokenizer, column="body")
    with pytest.raises(PruneForgeError, match="column 'body'"):
        draw(rows["parquet"], tokenizer, column="body")
    with pytest.raises(PruneForgeError, match=r"there is no file or folder '.*\[a:b\]'"):
        draw(f"{rows['jsonl']}[a:b]", tokenizer)
    with pytest.raises(PruneForgeError, match=r"slice \[90:\] selects none of 12 rows"):
        draw(f"{rows['jsonl']}[90:]", tokenizer)


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (False, r"tokens in documents longer than 64, too little for 10{13} samples"),
        (True, "samples of 64, and 10{13} were"),
    ],
)
def test_more_samples_than_a_text_can_hold_are_refused_before_any_is_drawn(pack, said, tmp_path, checkpoint):
    (tmp_path / "text.txt").write_text("one two three " * 1000)
    with pytest.raises(PruneForgeError, match=said):
        pruneforge.prune(
            checkpoint, "wanda", 0.5, calibration=tmp_path / "text.txt", samples=10**13, seqlen=64,
            source_options={"pack": pack},
        )  # fmt: skip


@pytest.mark.parametrize("text", ["9" * 5_000, "9" * 5_000 + "%", "0" * 5_000 + "99"])
def test_a_slice_of_thousands_of_digits_is_beyond_every_row(text):
    from pruneforge_text.slices import Slice

    with pytest.raises(PruneForgeError, match="selects none of 10 rows"):
        Slice(text, "").bounds(10)
    assert Slice("", text).bounds(10) == (0, 10)
