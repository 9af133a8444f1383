"""What `push` uploads, to a server of the test's own that speaks as the Hub does, and what it refuses."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from commands import invoke
from huggingface_hub import constants
from made_up_study import made_up

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.runs.places import STUDY_FILE, hub_id
from pruneforge.studies.report import write_report

SHA = "1" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned model that was evaluated."""
    folder = tmp_path_factory.mktemp("made") / "out"
    pruneforge.prune("demo:image", "wanda", 0.5, None, "digits", samples=4, output=folder, options={"scope": "layer"})
    pruneforge.evaluate(folder, "imagenet", data="digits", workers=0, limit=20)
    return folder


@pytest.fixture
def pruned(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pruned")


@pytest.fixture
def hub(monkeypatch):
    """A server that takes commits; `commits` holds the files of each, and `removed` the names that each removes.

    `there` is what the repository holds.
    """

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            siblings = [{"rfilename": name} for name in (".gitattributes", *server.there)]
            self.answer({"id": "me/mine", "sha": SHA, "private": server.private, "siblings": siblings, "tags": []})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/create"):
                server.created.append(json.loads(body))
                self.answer({"url": f"{address}/me/mine", "id": "me/mine"})
            elif "/preupload/" in self.path:
                wanted = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]})
            elif self.path.endswith("/validate-yaml"):
                self.answer({"errors": [], "warnings": []})
            else:
                assert "/commit/" in self.path
                entries = [json.loads(line) for line in body.splitlines()]
                files = [entry["value"] for entry in entries if entry["key"] == "file"]
                server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
                server.removed.append([e["value"]["path"] for e in entries if e["key"] == "deletedFile"])
                (head,) = [entry["value"] for entry in entries if entry["key"] == "header"]
                assert head["parentCommit"] == SHA
                self.answer({"commitOid": "0" * 40, "commitUrl": f"{address}/me/mine/commit/0", "success": True})

        def answer(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.private, server.created, server.commits, server.there, server.removed = True, [], [], [], []
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)  # which HF_ENDPOINT sets
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_dry_run_lists_every_file_but_those_that_are_nobody_s_business(pruned):
    for place in (
        ".git/config",
        ".env",
        "run.lock",
        ".lock",
        ".work-x/model",
        "inner/journal.jsonl",
        "inner/.cache/x",
        "inner/notes.txt",
    ):
        (pruned / place).parent.mkdir(parents=True, exist_ok=True)
        (pruned / place).write_text("secret")
    found = pruneforge.push(pruned, "me/mine", dry_run=True)
    expected = {path.name: path.stat().st_size for path in pruned.iterdir() if path.is_file()}
    del expected[".env"], expected["run.lock"], expected[".lock"]
    assert {"model.safetensors", "pruneforge.masks", "pruneforge.json", "recipe.yaml"} <= set(expected)
    card = {"README.md": len(found["card"].encode())}
    assert found["files"] == {**expected, **card, "inner/notes.txt": 6}
    left_out = [".env", ".git/", ".lock", ".work-x/", "inner/.cache/", "inner/journal.jsonl", "run.lock"]
    assert sorted(found["left_out"]) == left_out
    assert (found["kind"], found["url"]) == ("model", None)
    assert not (pruned / "README.md").exists()


def test_the_card_says_what_the_report_says(pruned):
    report = pruneforge.load(pruned).report
    card = pruneforge.push(pruned, "me/mine", dry_run=True)["card"]
    assert front_matter(card) == {"tags": ["pruneforge", "pruning", "sparsity"]}  # a demo is no model of the Hub
    for text in (
        "# mine\n",
        "| base model | `demo:image` |",
        "| metric | `wanda` (scope=layer) |",
        "| pattern | 0.5, compared within each layer |",
        f"| sparsity | {report['sparsity']['reached']:.2%} of {report['sparsity']['weights']:,} weights",
        "| calibration | `digits`, 4 samples",
        f"| imagenet | data=digits, workers=0, limit=20 | top1 | {report['evaluation'][0]['top1']:.2%} |",
        "pruneforge prune --config recipe.yaml --output repeated",
    ):
        assert text in card, card
    report["recipe"]["model"], report["warnings"] = "me/`base`", ["one | two\n\n# <b>"]
    report["evaluation"].append({"task": "theirs", "bits": 3, "recipe": {"options": {}}})
    (pruned / "pruneforge.json").write_text(json.dumps(report))
    card = pruneforge.push(pruned, "me/mine", dry_run=True)["card"]
    assert "\n- one \\| two # \\<b>\n" in card
    assert "| base model | me/\\`base\\` |" in card
    assert "| theirs |  | loss | in `pruneforge.json` |" in card


def test_a_card_of_the_folder_s_own_is_kept_and_one_of_the_dense_model_is_not_taken_over(checkpoint, tmp_path):
    dense = shutil.copytree(checkpoint, tmp_path / "dense")
    (dense / "README.md").write_text("# The dense model")
    pruneforge.prune(dense, "magnitude", 0.5, output=tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "README.md").exists()
    (tmp_path / "pruned" / "README.md").write_text("# Mine")
    found = pruneforge.push(tmp_path / "pruned", "me/mine", dry_run=True)
    assert (found["card"], found["files"]["README.md"]) == (None, len("# Mine"))


@pytest.mark.parametrize("streamed", [True, False])
def test_the_licence_of_the_dense_model_is_kept(streamed, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    stated = "license: other\nlicense_name: llama2\nlicense_link: https://example.org/licence"
    (model / "README.md").write_text(f"---\nlanguage: en\n{stated}\ntags: [a]\n---\n\n# About the dense model\n")
    result = pruneforge.prune(model, "magnitude", 0.5, output=tmp_path / "out")
    card = pruneforge.push(tmp_path / "out", "me/mine", dry_run=True)["card"]
    front = yaml.safe_load(card.split("---")[1])
    assert {name: front[name] for name in front if name.startswith("license")} == yaml.safe_load(stated)
    assert "About the dense model" not in card
    assert result.report["model"]["license"]["license"] == "other"
    for unreadable in ("---\nlicense: [a]\n---\n", "no front matter", "---\n{\n---\n", "---\n- a\n---\n"):
        (model / "README.md").write_text(unreadable)
        settings = {"output": tmp_path / "again"} if streamed else {}
        again = pruneforge.prune(model, "magnitude", 0.5, **settings)
        assert "license" not in again.report["model"]
        shutil.rmtree(tmp_path / "again", ignore_errors=True)


def test_a_push_commits_exactly_what_the_dry_run_lists(pruned, hub):
    listed = pruneforge.push(pruned, "me/mine", dry_run=True)
    done = invoke("push", pruned, "--to", "me/mine", "--private", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {**listed, "url": f"{constants.ENDPOINT}/me/mine/commit/0"}
    (created,), (files,) = hub.created, hub.commits
    assert (created["name"], created["organization"]) == ("mine", "me")
    assert created.get("private") or created["visibility"] == "private"
    assert {name: len(content) for name, content in files.items()} == listed["files"]
    assert files.pop("README.md").decode() == listed["card"]
    assert all(content == (pruned / name).read_bytes() for name, content in files.items())


def test_nothing_is_pushed_to_a_public_repository_that_should_be_private(pruned, hub):
    hub.private = False
    done = invoke("push", pruned, "--to", "me/mine", "--private")
    assert done.exit_code == 2
    assert done.output == "pruneforge: 'me/mine' exists and is public; make it private on the Hub, or name another\n"
    assert hub.commits == []
    assert invoke("push", pruned, "--to", "me/mine").exit_code == 0
    assert len(hub.commits) == 1


def test_weights_of_an_earlier_result_go_in_the_same_commit_and_its_readme_stays(pruned, hub):
    listed = pruneforge.push(pruned, "me/mine", dry_run=True)
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    hub.there = ["README.md", "pruneforge.json", "notes.txt", "model.safetensors", *shards]
    done = invoke("push", pruned, "--to", "me/mine")
    assert done.exit_code == 0, done.output
    assert f"kept the repository's README.md\nremoved from the repository: {', '.join(shards)}\n" in done.output
    assert hub.removed == [shards]
    assert set(hub.commits[0]) == set(listed["files"]) - {"README.md"}
    (pruned / "README.md").write_text("# Mine")
    pruneforge.push(pruned, "me/mine")
    assert hub.commits[1]["README.md"] == b"# Mine"


def test_a_repository_that_holds_something_else_is_left_alone(pruned, hub):
    hub.there = ["README.md", "config.json", "model.safetensors"]
    done = invoke("push", pruned, "--to", "me/mine")
    assert done.exit_code == 2
    said = "'me/mine' holds 'config.json' and no result of PruneForge; name another repository, or a new one"
    assert done.output == f"pruneforge: {said}\n"
    assert hub.commits == []
    hub.there = ["README.md"]
    assert invoke("push", pruned, "--to", "me/mine").exit_code == 0


def test_links_out_of_the_folder_are_left_out(pruned, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "more").mkdir()
    (pruned / "out.txt").symlink_to(tmp_path / "secret")
    (pruned / "more").symlink_to(tmp_path / "more")
    (pruned / "inside.json").symlink_to("pruneforge.json")
    found = pruneforge.push(pruned, "me/mine", dry_run=True)
    assert sorted(found["left_out"]) == ["more/", "out.txt"]
    assert found["files"]["inside.json"] == (pruned / "pruneforge.json").stat().st_size
    (pruned / "gone.txt").symlink_to("nowhere")
    with pytest.raises(PruneForgeError) as error:
        pruneforge.push(pruned, "me/mine", dry_run=True)
    assert str(error.value) == f"'{pruned / 'gone.txt'}' cannot be read, or is a link to nothing; mend or remove it"


def test_the_base_model_is_named_if_it_was_of_the_hub_where_it_was_pruned(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "llama/base")
    pruneforge.prune("llama/base", "magnitude", 0.5, output="pruned")
    monkeypatch.chdir(tmp_path / "pruned")  # where llama/base is no folder
    assert "base_model" not in front_matter(pruneforge.push(".", "me/mine", dry_run=True)["card"])
    report = json.loads((tmp_path / "pruned" / "pruneforge.json").read_text())
    report["model"]["on_hub"] = True
    (tmp_path / "pruned" / "pruneforge.json").write_text(json.dumps(report))
    assert front_matter(pruneforge.push(".", "me/mine", dry_run=True)["card"])["base_model"] == "llama/base"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("me/base", True),
        ("hf-hub:me/base", True),
        ("timm:vit", False),
        ("./me/base", False),
        ("LlamaForCausalLM", False),
    ],
)
def test_a_name_is_of_the_hub_if_it_has_an_owner_and_is_no_folder(model, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (hub_id(model) is not None) == expected
    (tmp_path / "me" / "base").mkdir(parents=True)
    assert hub_id("me/base") is None


def test_a_study_is_pushed_as_a_data_set_without_its_work(tmp_path, hub):
    study = tmp_path / "study"
    failed = []

    def change(cell, found):
        if not failed:
            failed.append(cell.key)
            found.clear()
            found["failed"] = "out of memory"

    write_report(*made_up(study, change, methods={"wanda": {"metric": "wanda"}}, seeds=[0]), study)
    expected = {str(path.relative_to(study)) for path in study.rglob("*") if path.is_file()}
    assert f"cells/{failed[0]}/cell.json" in expected
    (study / ".work-x" / "m0").mkdir(parents=True)
    for place in (".lock", ".work-x/lock", ".work-x/m0/model"):
        (study / place).write_text("x")
    done = invoke("push", study, "--to", "me/mine")
    assert done.exit_code == 0, done.output
    assert "left out: .work-x/, .lock\n" in done.output
    (files,) = hub.commits
    assert set(files) == {*expected, "README.md"}
    assert (study / "report.md").read_text() in files["README.md"].decode()
    assert front_matter(files["README.md"].decode())["configs"][0]["data_files"] == "results.csv"
    assert hub.created[0]["type"] == "dataset"


@pytest.mark.parametrize("ran", [False, True])
def test_a_study_is_unfinished_until_its_report_is_of_every_cell(ran, tmp_path):
    methods = {"wanda": {"metric": "wanda"}}
    study, cells = made_up(tmp_path, methods=methods, seeds=[0], controls=False)
    write_report(study, cells, tmp_path)
    pruneforge.push(tmp_path, "me/mine", dry_run=True)
    before = (tmp_path / STUDY_FILE).read_text()
    made_up(tmp_path, methods=methods, seeds=[0, 1], controls=False)  # extended: run with `cells`, or not yet
    assert (tmp_path / STUDY_FILE).read_text() != before
    if not ran:
        shutil.rmtree(tmp_path / "cells" / "text" / "wanda" / "0.5" / "1")
    with pytest.raises(PruneForgeError, match=r"unfinished study: its report lacks 'text/wanda/0\.5/1'; run it again"):
        pruneforge.push(tmp_path, "me/mine", dry_run=True)


def test_what_cannot_be_pushed_is_one_line(pruned, tmp_path):
    def refused(said, folder, to="me/mine", **settings):
        with pytest.raises(PruneForgeError) as error:
            pruneforge.push(folder, to, **settings)
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    refused("cannot be pushed to: Cannot reach https://huggingface.co", pruned)  # the tests are offline
    refused("is not the name of a repository", pruned, "me/mine/more", dry_run=True)
    refused("is not the name of a repository", pruned, "me/my model", dry_run=True)
    refused("'mine' is not the name of a repository: it needs an owner", pruned, "mine", dry_run=True)
    refused(f"several runs; push one of them, such as '{pruned}'", tmp_path, dry_run=True)
    refused("does not exist", tmp_path / "nowhere", dry_run=True)
    (tmp_path / "other").mkdir()
    refused("is the output of neither a pruning run nor a study", tmp_path / "other", dry_run=True)
    (pruned / "journal.jsonl").touch()
    refused("holds an unfinished run; finish it with `resume`", pruned, dry_run=True)
