"""Files of text, JSON and YAML from anywhere are read as data, within limits, or refused in one line."""

from __future__ import annotations

import os

import pytest

from pruneforge.documents import MOST_VALUES, parse_json, parse_yaml, read_json, read_text, read_yaml
from pruneforge.errors import PruneForgeError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


def refusal(parse, text):
    with pytest.raises(PruneForgeError) as error:
        parse(text, "recipe 'r.yaml'")
    message = str(error.value)
    assert message.startswith("recipe 'r.yaml'")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, f"more than {MOST_VALUES:,} values"),
        ("a: &a [*a]", "stands for nothing before it, or for itself"),
        ("a: *b", "'b'"),
        ("[" * 10_000, "levels deep"),
        ("{" * 10_000, "levels deep"),
        ("- " * 10_000, "levels deep"),
        ("a: 1\nb: 2\na: 3", "key 'a' is there twice"),
        ("a: !!python/object/apply:os.system [true]", "constructor for the tag"),
        ("a: !!python/name:os.system", "constructor for the tag"),
        ("a: !!binary aGVsbG8=", "constructor for the tag"),
        ("a: !!set {b, c}", "constructor for the tag"),
        ("a: !!timestamp 2024-01-01", "constructor for the tag"),
        ("a: " + "9" * 5_000, "4300 digits"),
        ("? [a, b]\n: c", "unhashable key"),
        ("a: \x00", "control characters"),
        ("a: [", "expected"),
        ("a" * (5 << 20), "larger than 4 MiB"),
        ("\ud800", "surrogates"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(text, said):
    # PyYAML 6.0.4 has a limit of its own for nested brackets, which is looked at first.
    assert said in refusal(parse_yaml, text).replace("exceeded maximum nesting depth", "levels deep")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5_000, "4300 digits"),
        ('{"text": "\\ud800"}', "surrogates"),
        ('{"a": 1', "delimiter"),
    ],
)
def test_json_that_is_damaged_is_refused(text, said):
    assert said in refusal(parse_json, text)


def test_plain_yaml_is_read_as_the_safe_loader_does_but_for_dates():
    text = "a: 1\nb: [1.5, true, null, x]\nc: {d: 2024-01-01, e: '1'}\nf: &f {g: 1, h: 2}\ni: {<<: *f, g: 3}\n"
    assert parse_yaml(text, "r") == {
        "a": 1,
        "b": [1.5, True, None, "x"],
        "c": {"d": "2024-01-01", "e": "1"},
        "f": {"g": 1, "h": 2},
        "i": {"g": 3, "h": 2},
    }
    assert parse_yaml("", "r") is None
    assert parse_json('"\\ud83d\\ude00"', "r") == "\U0001f600"


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
def test_only_regular_files_are_opened(read, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases = {
        pipe: "is not a regular file",
        tmp_path: "is not a regular file",
        tmp_path / "none": "does not exist",
        tmp_path / ("n" * 300): "cannot be read",
        tmp_path / "null\0character": "null",
    }
    for path, said in cases.items():
        with pytest.raises(PruneForgeError) as error:
            read(path, "file")
        assert said in str(error.value)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(PruneForgeError, match="is not text in UTF-8"):
        read(latin, "file")


def test_json_is_read_as_json_by_its_name(tmp_path):
    file = tmp_path / "report.json"
    file.write_text('{"a":\t[1, 1]}')  # a tab is no YAML
    assert read_yaml(file, "recipe") == {"a": [1, 1]}
