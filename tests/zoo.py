"""A folder of damaged, forged, empty, huge and misnamed files, for commands that must refuse them in one line."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

import pruneforge

CHECKPOINTS = Path(__file__).parents[1] / "plugins" / "pruneforge_demo" / "checkpoints"
WEIGHTS = "model.safetensors"

RECIPES = {
    "tag.yaml": "metric: !!python/name:os.system",
    "date.yaml": "sparsity: 2024-01-01",
    "nan.yaml": "sparsity: .nan",
    "inf.yaml": "samples: .inf",
    "neg.yaml": "samples: -5",
    "big.yaml": "samples: 100000000000000000000000",
    "list.yaml": "metric: [wanda]",
    "map.yaml": "sparsity: {a: 1}",
    "opts.yaml": "options: 5",
    "opts2.yaml": "options: {alpha: {a: 1}}",
    "excl.yaml": "exclude: {a: 1}",
    "excl2.yaml": "exclude: [1]",
    "calib.yaml": "calibration: {name: c4, a: 1}",
    "null.yaml": "metric: null",
    "bool.yaml": "metric: true",
    "seed.yaml": "seed: 1e400",
    "out.yaml": "output: [a]",
    "model.yaml": "model: 5",
    "streams.yaml": "streams: [a]",
    "streams2.yaml": "streams: {a: 5}",
    "plug.yaml": "plugins: 5",
    "plug2.yaml": "plugins: [evil.py]",
    "force.yaml": "task: perplexity\noptions: {data: t.txt}\noutput: file\nforce: true",
    "trust.yaml": "trust: [include_path=empty]",
    "include.yaml": "task: lm-eval\noptions: {tasks: t, include_path: model}",
    "include2.yaml": "task: lm-eval:t\ninclude_path: empty",
}

PLUGINS = {
    "p_syntax.py": "def (:\n",
    "p_raise.py": "raise ValueError('boo')\n",
    "p_exit.py": "import sys; sys.exit(3)\n",
    "p_badscore.py": """from pruneforge import Metric

class Bad(Metric):
    def score(self, layer, stats):
        return layer.weight[:1]

class Nan(Metric):
    def score(self, layer, stats):
        return layer.weight * float("nan")

class Raises(Metric):
    def score(self, layer, stats):
        raise KeyError("a")

class NoneScore(Metric):
    def score(self, layer, stats):
        return None
""",
}

MODELS = "models: {a: {model: model, tasks: [{task: perplexity, options: {data: t.txt, window: 16}}]}}\n"
METHODS = "methods: {w: {metric: magnitude}}\n"
STUDIES = {
    "s_empty": "",
    "s_list": "[]",
    "s_unknown": "modls: {}\n",
    "s_nomodels": METHODS + "patterns: [0.5]\n",
    "s_types": "models: 5\nmethods: 5\npatterns: 5\n",
    "s_task": "models: {a: {model: model, tasks: [{task: nonsense}]}}\n" + METHODS + "patterns: [0.5]\n",
    "s_name": MODELS.replace("{a:", '{"../x":') + METHODS + "patterns: [0.5]\n",
    "s_badpat": MODELS + METHODS + "patterns: [0.5]\n",
    "s_bad_pattern": MODELS + METHODS + 'patterns: ["x:y"]\n',
    "s_bad_patterns": MODELS + METHODS + "patterns: [[1]]\n",
    "s_bad_metric": MODELS + "methods: {w: {metric: nonsense}}\npatterns: [0.5]\n",
    "s_bad_seed": MODELS + METHODS + "patterns: [0.5]\nseeds: [-1]\n",
    "s_hugeseed": MODELS + METHODS + "patterns: [0.5]\nseeds: [100000000000000000000]\n",
    "s_code": MODELS.replace(
        "perplexity, options: {data: t.txt, window: 16}", "lm-eval:t, options: {include_path: empty}"
    )
    + METHODS
    + "patterns: [0.5]\n",
    "s_twice": "models: {a: {model: model}, a: {model: model}}\n",
    "s_laughs": "a: &a0 [1, 1]\n" + "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
}


def build(folder: Path) -> None:
    """Fill `folder`."""
    shutil.copytree(CHECKPOINTS / "text", folder / "model")
    shutil.copytree(CHECKPOINTS / "image", folder / "vit")
    for name, content in {**RECIPES, **PLUGINS, **{f"{name}.yaml": text for name, text in STUDIES.items()}}.items():
        (folder / name).write_text(content)
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe.yaml")
    _models(folder)
    _texts(folder)
    _images(folder)
    _results(folder)


def _models(folder: Path) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    for name, changes in {
        "cfg_hugeint": {"hidden_size": 10**30},
        "cfg_neg": {"num_hidden_layers": -1},
        "cfg_zero": {"num_hidden_layers": 0},
        "cfg_str": {"hidden_size": "abc"},
        "cfg_remote": {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"},
        "cfg_type": {"model_type": 5},
    }.items():
        _variant(folder, name, "config.json", json.dumps({**config, **changes}).encode())
    for name, content in {
        "cfg_empty": b"",
        "cfg_list": b"[]",
        "cfg_deep": b"[" * 100_000,
        "cfg_latin": b"\xff\xfe",
    }.items():
        _variant(folder, name, "config.json", content)
    _variant(folder, "no_cfg", "config.json", None)
    _variant(folder, "no_weights", WEIGHTS, None)
    _variant(folder, "tok_bad", "tokenizer.json", b"{")
    _variant(folder, "tok_none", "tokenizer.json", None)
    _variant(folder, "vit_cfg", "config.json", b'{"architecture": 5}', of="vit")
    image = json.loads((folder / "vit" / "config.json").read_text())
    _variant(folder, "vit_cfg2", "config.json", json.dumps({**image, "architecture": "nonsense"}).encode(), of="vit")
    weights = (folder / "model" / WEIGHTS).read_bytes()
    _variant(folder, "cut", WEIGHTS, weights[:-100])
    _variant(folder, "header", WEIGHTS, bytes(100))
    _variant(folder, "overlapping", WEIGHTS, _overlapping(weights))
    _variant(folder, "index", WEIGHTS, None)
    (folder / "index" / f"{WEIGHTS}.index.json").write_text("{")
    for name, index in (("outside", f"{WEIGHTS}.index.json"), ("outside_bin", "pytorch_model.bin.index.json")):
        _variant(folder, name, WEIGHTS, None)
        (folder / name / index).write_text(json.dumps({"weight_map": {"lm_head.weight": f"../model/{WEIGHTS}"}}))
    below = json.dumps({**config, "transformers_weights": f"below/{WEIGHTS}.index.json"}).encode()
    _variant(folder, "outside_below", "config.json", below)
    _variant(folder, "linked_below", WEIGHTS, None)
    for name in ("outside_below", "linked_below"):
        (folder / name / "below").mkdir()
    (folder / "linked_below" / "below" / WEIGHTS).symlink_to(folder / "model" / WEIGHTS)
    _variant(folder, "linked", "tokenizer.json", None)
    (folder / "linked" / "tokenizer.json").symlink_to(folder / "file")
    _variant(folder, "piped", "tokenizer.json", None)
    os.mkfifo(folder / "piped" / "tokenizer.json")
    _variant(folder, "unfinished", "journal.jsonl", b"{}\n")
    (folder / "study" / "cells").mkdir(parents=True)
    (folder / "study" / "study.yaml").write_text("{}")


def _overlapping(weights: bytes) -> bytes:
    """Return a file of weights whose last two tensors are said to be in one place."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    *_, before, last = sorted(header, key=lambda name: header[name]["data_offsets"])
    header[last] = header[before]
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + length :]


def _texts(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name, content in {
        "t.txt": "hello world. " * 3000,
        "empty.txt": "",
        "short.txt": "hi",
        "sur.jsonl": '{"text": "\\ud800 abc"}\n' * 100,
        "num.jsonl": '{"text": 5}\n',
        "bad.jsonl": '{"text": \n',
        "deep.jsonl": "[" * 100_000,
        "list.jsonl": '{"text": ["a", "b"]}\n',
    }.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1") * 1000)
    (folder / "bad.parquet").write_bytes(b"PAR1xxxx")
    parquet.write_table(pyarrow.table({"text": [["a", "b"]] * 10, "n": [1] * 10}), folder / "list.parquet")
    parquet.write_table(pyarrow.table({"text": [b"abc"] * 10}), folder / "bytes.parquet")


def _images(folder: Path) -> None:
    for name in "ab":
        (folder / "imgs" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / "imgs" / name / f"{number}.png")
    for number, name in enumerate("ab"):
        shutil.copytree(folder / "imgs" / name, folder / "numbered" / str(number))
    shutil.copytree(folder / "numbered", folder / "imgfifo")
    os.mkfifo(folder / "imgfifo" / "0" / "p.png")
    (folder / "trunc.zip").write_bytes(b"PK\x03\x04aaaa")
    (folder / "trunc.tar").write_bytes(b"x" * 600)
    (folder / "trunc.tgz").write_bytes(b"\x1f\x8b\x08\x00")
    with zipfile.ZipFile(folder / "cut.zip", "w") as archive:
        archive.write(folder / "imgs" / "a" / "0.png", "a/0.png")
    for name, mode in (("cut.tar", "w"), ("cut.tgz", "w:gz")):
        with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
            archive.add(folder / "imgs", arcname="x")
    for name in ("cut.zip", "cut.tar", "cut.tgz"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])


def _results(folder: Path) -> None:
    """Make the output of a run, and damaged copies of it."""
    pruneforge.prune(folder / "model", "magnitude", 0.5, output=folder / "pruned")
    shutil.copytree(folder / "pruned", folder / "several" / "0.5")
    report = json.loads((folder / "pruned" / "pruneforge.json").read_text())
    half: dict[str, Any] = {**report, "sparsity": {**report["sparsity"], "reached": "half"}}
    for name, content in {
        "pruned_report": json.dumps(half).encode(),
        "pruned_format": json.dumps({**report, "format": 0}).encode(),
        "pruned_json": b"{",
    }.items():
        _variant(folder, name, "pruneforge.json", content, of="pruned")
    masks = (folder / "pruned" / "pruneforge.masks").read_bytes()
    _variant(folder, "pruned_masks", "pruneforge.masks", masks.replace(b"128", b"129"), of="pruned")


def _variant(folder: Path, name: str, file: str, content: bytes | None, of: str = "model") -> None:
    """Copy a model with one file changed, or without it."""
    shutil.copytree(folder / of, folder / name)
    if content is None:
        (folder / name / file).unlink()
    else:
        (folder / name / file).write_bytes(content)
