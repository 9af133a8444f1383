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

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.studies.study import STUDY_FILE


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
    """A server that takes commits; `commits` holds the files of each."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"id": "me/mine", "private": server.private, "siblings": [], "tags": []})

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
                self.answer({"commitOid": "0" * 40, "commitUrl": f"{address}/me/mine/commit/0", "success": True})

        def answer(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.private, server.created, server.commits = True, [], []
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
    for place in (".git/config", ".env", "run.lock", "inner/journal.jsonl", "inner/.cache/x", "inner/notes.txt"):
        (pruned / place).parent.mkdir(parents=True, exist_ok=True)
        (pruned / place).write_text("secret")
    found = pruneforge.push(pruned, "me/mine", dry_run=True)
    expected = {path.name: path.stat().st_size for path in pruned.iterdir() if path.is_file()}
    del expected[".env"], expected["run.lock"]
    assert {"model.safetensors", "masks.safetensors", "pruneforge.json", "recipe.yaml"} <= set(expected)
    card = {"README.md": len(found["card"].encode())}
    assert found["files"] == {**expected, **card, "inner/notes.txt": 6}
    assert sorted(found["left_out"]) == [".env", ".git/", "inner/.cache/", "inner/journal.jsonl", "run.lock"]
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
    report["recipe"]["model"], report["warnings"] = "meta-llama/Llama-2-7b-hf", ["one | two"]
    report["evaluation"].append({"task": "theirs", "bits": 3, "recipe": {"options": {}}})
    (pruned / "pruneforge.json").write_text(json.dumps(report))
    card = pruneforge.push(pruned, "me/mine", dry_run=True)["card"]
    assert front_matter(card)["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert "\n- one | two\n" in card
    assert "| theirs |  | loss | in `pruneforge.json` |" in card


def test_a_card_of_the_folder_s_own_is_kept_and_one_of_the_dense_model_is_not_taken_over(checkpoint, tmp_path):
    dense = shutil.copytree(checkpoint, tmp_path / "dense")
    (dense / "README.md").write_text("# The dense model")
    pruneforge.prune(dense, "magnitude", 0.5, output=tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "README.md").exists()
    (tmp_path / "pruned" / "README.md").write_text("# Mine")
    found = pruneforge.push(tmp_path / "pruned", "me/mine", dry_run=True)
    assert (found["card"], found["files"]["README.md"]) == (None, len("# Mine"))


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


def test_a_study_is_pushed_as_a_data_set_without_its_work(tmp_path, hub):
    study = tmp_path / "study"
    for place in (STUDY_FILE, "report.html", "results.csv", "cells/m/wanda/0.5/0/cell.json", "work/m0/model"):
        (study / place).parent.mkdir(parents=True, exist_ok=True)
        (study / place).write_text("x")
    (study / "report.md").write_text("| method | 0.5 |\n")
    done = invoke("push", study, "--to", "me/mine")
    assert done.exit_code == 0, done.output
    assert "left out: work/\n" in done.output
    (files,) = hub.commits
    assert set(files) == {
        STUDY_FILE,
        "report.html",
        "report.md",
        "results.csv",
        "cells/m/wanda/0.5/0/cell.json",
        "README.md",
    }
    assert "| method | 0.5 |" in files["README.md"].decode()
    assert front_matter(files["README.md"].decode())["configs"][0]["data_files"] == "results.csv"
    assert hub.created[0]["type"] == "dataset"
    (study / "report.html").unlink()
    with pytest.raises(PruneForgeError, match="holds an unfinished study; run it again"):
        pruneforge.push(study, "me/mine", dry_run=True)


def test_what_cannot_be_pushed_is_one_line(pruned, tmp_path):
    def refused(said, folder, to="me/mine", **settings):
        with pytest.raises(PruneForgeError) as error:
            pruneforge.push(folder, to, **settings)
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    refused("cannot be pushed to: Cannot reach https://huggingface.co", pruned)  # the tests are offline
    refused("is not the name of a repository", pruned, "me/mine/more", dry_run=True)
    refused("is not the name of a repository", pruned, "me/my model", dry_run=True)
    refused(f"several runs; push one of them, such as '{pruned}'", tmp_path, dry_run=True)
    refused("does not exist", tmp_path / "nowhere", dry_run=True)
    (tmp_path / "other").mkdir()
    refused("is the output of neither a pruning run nor a study", tmp_path / "other", dry_run=True)
    (pruned / "journal.jsonl").touch()
    refused("holds an unfinished run; finish it with `resume`", pruned, dry_run=True)
