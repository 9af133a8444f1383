"""What SECURITY.md promises: data run no code, read nothing beside themselves, and write nothing outside."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from commands import invoke
from PIL import Image

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.runs.card import model_card

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "plugins" / "pruneforge_demo" / "checkpoints"
SOURCES = sorted(path for folder in ("pruneforge", "plugins") for path in (ROOT / folder).rglob("*.py"))


class Evil:
    """An object whose unpickling writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_no_source_unpickles_or_trusts_remote_code():
    for path in SOURCES:
        for call in calls(path):
            name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in ("pickle.load", "pickle.loads", "yaml.load_all", "yaml.unsafe_load", "eval", "exec"), (
                path
            )
            assert given.get("trust_remote_code", "False") == "False", path
            if name == "torch.load":
                assert given.get("weights_only") == "True", path
            if name == "yaml.load":
                assert path.name == "documents.py"  # a loader of plain values


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickled_checkpoint_runs_nothing(name, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "model.safetensors").unlink()
    with (model / name).open("wb") as file:
        pickle.dump({"lm_head.weight": Evil(tmp_path / "ran")}, file)
    done = invoke("prune", model, "--metric", "magnitude", "--output", tmp_path / "out")
    assert done.exit_code == 2, done.exception
    torch.save({"lm_head.weight": Evil(tmp_path / "ran")}, model / name)
    assert invoke("prune", model, "--metric", "magnitude", "--output", tmp_path / "out").exit_code == 2
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_models_folder_is_not_run(known, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    mapped = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    changes = {"auto_map": mapped} if known else {"auto_map": mapped, "model_type": "evil"}
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil.A", None]}})
    )
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    settings = ("--calibration", "python-docs", "--samples", 2, "--seqlen", 16, "--output", tmp_path / "out")
    done = invoke("prune", model, "--metric", "wanda", *settings)
    assert (done.exit_code == 0) is known, done.output
    assert not (tmp_path / "ran").exists()


def test_names_in_an_archive_lead_nowhere(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "images.zip", "w") as archive:
        for name in ("../../0/0.png", f"{tmp_path}/1/1.png", "2/2.png"):
            archive.write(tmp_path / "image.png", name)
    before = sorted(tmp_path.rglob("*"))
    settings = {"sparsity": 0.5, "samples": 3, "source_options": {"path": str(inside / "images.zip")}}
    pruneforge.prune("demo:image", "wanda", calibration="images", **settings)
    with tarfile.open(inside / "images.tar", "w") as archive:
        for name in ("../../0/0.png", f"{tmp_path}/1/1.png", "2/2.png"):
            archive.add(tmp_path / "image.png", name)
        link = tarfile.TarInfo("3/secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "image.png")
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    settings["source_options"] = {"path": str(inside / "images.tar")}
    pruneforge.prune("demo:image", "wanda", calibration="images", **settings)
    with pytest.raises(PruneForgeError, match="has 3 readable images and 4 were asked for"):  # not what the link names
        pruneforge.prune("demo:image", "wanda", calibration="images", **{**settings, "samples": 4})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pickled_checkpoint_of_timm_runs_nothing(tmp_path):
    model = shutil.copytree(CHECKPOINTS / "image", tmp_path / "model")
    (model / "model.safetensors").unlink()
    for dump in (pickle.dumps, None):
        file = model / "pytorch_model.bin"
        content = {"head.weight": Evil(tmp_path / "ran")}
        if dump is None:
            torch.save(content, file)
        else:
            file.write_bytes(dump(content))
        done = invoke("prune", model, "--metric", "magnitude", "--output", tmp_path / "out")
        assert done.exit_code == 2, done.exception
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


TASK = """
task: evil
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: !function code.run
doc_to_choice: [a, b]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.mark.parametrize("how", ["flag", "assigned", "recipe", "options", "search"])
def test_a_folder_of_tasks_runs_only_if_it_is_typed(how, checkpoint, tmp_path):
    folder, ran = tmp_path / "tasks", tmp_path / "ran"
    folder.mkdir()
    (tmp_path / "data.jsonl").write_text('{"question": "x"}\n' * 2)
    (folder / "evil.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    (folder / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef run(doc):\n    return 'x'\n"
    )
    recipe = tmp_path / "recipe.yaml"
    evaluate = ("eval", checkpoint, "--task", "lm-eval:evil", "--limit", 2)
    if how == "flag":
        done = invoke(*evaluate, "--include-path", folder)
    elif how == "assigned":
        done = invoke(*evaluate, "--option", f"include_path={folder}")
    elif how == "recipe":
        recipe.write_text(f"include_path: {folder}\n")
        done = invoke(*evaluate, "--config", recipe)
    elif how == "options":
        recipe.write_text(f"options: {{include_path: {folder}}}\n")
        done = invoke(*evaluate, "--config", recipe, "--output", folder)  # typed, but as something else
    else:
        task = f"{{task: 'lm-eval:evil', task_options: {{include_path: {folder}}}, trials: 1}}"
        recipe.write_text(f"metric: magnitude\nallocator: search\nallocator_options: {task}\n")
        done = invoke("prune", checkpoint, "--config", recipe, "--output", tmp_path / "out")
    typed = how in ("flag", "assigned")
    assert (done.exit_code == 0) is typed, (done.output, done.exception)
    assert ran.exists() is typed
    if not typed:
        assert f"says include_path {str(folder)!r}, which may run code" in done.stderr


def test_the_card_escapes_what_it_is_told(tmp_path):
    result = pruneforge.prune("demo:text", "magnitude", 0.5)
    bad = "<script>alert(1)</script>|`x`\n# heading"
    report = {**result.report, "warnings": [bad], "recipe": {**result.report["recipe"], "model": bad}}
    card = model_card(report, bad)
    spans = re.sub(r"(`+).*?\1", "", re.sub(r"\\`", "", card))  # text within backticks is shown as it is
    assert not re.search(r"(?<!\\)<script>", spans)
    assert "\n# heading" not in card
