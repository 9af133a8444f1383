"""Count the lines of code of each first-party method, and of the same methods elsewhere.

    python docs/_ext/codelines.py [--peers DIR]

Writes `docs/results/code.md`. With `--peers`, a folder of git repositories named `OWNER+NAME`, the others are counted
anew, at the commits below, into `benchmarks/results/code_lines.json`.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import tokenize
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "code.md"
RESULTS = ROOT / "benchmarks" / "results" / "code_lines.json"

AIMS = {
    "magnitude": 15,
    "wanda": 15,
    "gblm": 15,
    "ria": 15,
    "random": 15,
    "owl": 20,
    "sparseswaps": 40,
    "admm": 30,
    "sparsegpt": 60,
}
"""Most lines that a method should take, registration included."""

APART = "kernel.py"
"""A method's optional kernel for GPUs, which is counted for itself."""

WHY = {
    "gblm": "four options, for the paper's ablations, and statistics that depend on them",
    "ria": "two ways to permute the columns for N:M",
    "owl": "two typed signatures of three lines each",
    "sparseswaps": "swaps of many rows at a time, and within the groups of N:M",
    "sparsegpt": "the kernel or plain torch, damping that rises where it has to, and a mask that may be given",
}
"""What takes the lines beyond the aim."""

LLM_COMPRESSOR = ("vllm-project/llm-compressor", "ab1ba3effcafc15746cd6d6ca24cba3f7bd7a582")
TORCHAO = ("pytorch/ao", "0d669dabadd00677b17b8ae4a6dfa2a634b26883")
LIGHT_COMPRESS = ("ModelTC/LightCompress", "9701d035b0aac5df97a2ebaadb30bcf0707616f5")
NN_PRUNING = ("Fullfix/nn-pruning", "a578cd5881f82923b023b12613ad0b6ec4cbd28b")
PRUNING = "src/llmcompressor/modifiers/pruning"
SPARSIFICATION = "llmc/compression/sparsification"

PEERS: tuple[tuple[str, tuple[str, str], str, tuple[str, ...]], ...] = (
    ("magnitude", LLM_COMPRESSOR, f"{PRUNING}/magnitude/base.py", ()),
    ("magnitude", LIGHT_COMPRESS, f"{SPARSIFICATION}/magnitude.py", ()),
    ("magnitude", NN_PRUNING, "pruning.py", ("MagnitudePruner",)),
    ("wanda", LLM_COMPRESSOR, f"{PRUNING}/wanda/base.py", ()),
    ("wanda", LLM_COMPRESSOR, f"{PRUNING}/wanda/wanda_sparsify.py", ()),
    ("wanda", LLM_COMPRESSOR, f"{PRUNING}/sparsegpt/sgpt_base.py", ()),
    ("wanda", TORCHAO, "torchao/sparsity/wanda.py", ()),
    ("wanda", LIGHT_COMPRESS, f"{SPARSIFICATION}/wanda.py", ()),
    ("wanda", NN_PRUNING, "pruning.py", ("WandaPruner",)),
    ("sparsegpt", LLM_COMPRESSOR, f"{PRUNING}/sparsegpt/base.py", ()),
    ("sparsegpt", LLM_COMPRESSOR, f"{PRUNING}/sparsegpt/sgpt_sparsify.py", ()),
    ("sparsegpt", LLM_COMPRESSOR, f"{PRUNING}/sparsegpt/sgpt_base.py", ()),
    ("sparsegpt", NN_PRUNING, "pruning.py", ("ActCovCreator", "SparseGPTPruner")),
)
"""Method, (repository, commit), file, and the classes of it that are counted; all of the file without any."""

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str, classes: Sequence[str] = ()) -> int:
    """Return the number of lines that hold code: no blank line, comment, docstring or import.

    Args:
        source: A Python file.
        classes: Count only these classes of it.
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(source)
    for node in ast.walk(tree):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if isinstance(node, ast.stmt) and (text or isinstance(node, ast.Import | ast.ImportFrom)):
            lines -= _lines(node)
    if classes:
        counted = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
        lines &= set().union(*map(_lines, counted))
    return len(lines)


def _lines(node: ast.stmt) -> set[int]:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    return set(range(first, (node.end_lineno or first) + 1))


def own_lines() -> dict[str, dict[str, int]]:
    """Return the lines of each file of each method's package; `__init__.py` registers it."""
    folders = {name: ROOT / "plugins" / f"pruneforge_{name}" for name in AIMS}
    return {
        name: {file.name: code_lines(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.py"))}
        for name, folder in folders.items()
    }


def method_lines() -> dict[str, int]:
    """Return the lines of each method with its registration, without a kernel."""
    return {name: sum(n for file, n in files.items() if file != APART) for name, files in own_lines().items()}


def peer_lines(folder: Path) -> list[int]:
    """Return the lines of each of `PEERS`, from git repositories in a folder."""
    counted = []
    for _, (repository, commit), path, classes in PEERS:
        there = next(p for p in folder.glob(repository.replace("/", "+") + "*") if p.is_dir())
        there = there / "repo" if (there / "repo").is_dir() else there
        command = ["git", "-C", str(there), "show", f"{commit}:{path}"]
        source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        counted.append(code_lines(source, classes))
    return counted


def page() -> str:
    """Return the page: our methods as they are now, and the others as they were counted last."""
    ours, files = method_lines(), own_lines()
    lines = [
        "# Lines of code",
        "",
        "Made by `python docs/_ext/codelines.py`. Lines that hold code count: no blank line, comment, docstring or "
        "import. Ours hold the method, its typed and described options, and its registration; "
        f"SparseGPT's optional kernel for GPUs ({files['sparsegpt'][APART]} lines) is not among them.",
        "",
        "| method | file | lines | aim | beyond it |",
        "|---|---|---:|---:|---|",
    ]
    for name, aim in AIMS.items():
        module = next(file for file in files[name] if file not in (APART, "__init__.py"))
        link = f"[`{module}`](../../plugins/pruneforge_{name}/{module})"
        beyond = f"{ours[name] - aim}: {WHY[name]}" if ours[name] > aim else ""
        lines.append(f"| `{name}` | {link} | {ours[name]} | {aim} | {beyond} |")
    lines += [
        "",
        "The same methods elsewhere, by the same count and without what registers them. `sgpt_base.py` is what "
        "llm-compressor's Wanda and SparseGPT share, most of it the modifier's life cycle. torchao's file is the last "
        "before it was removed; it, LightCompress and nn-pruning have base classes besides.",
        "",
        "| method | here | lines | counted | repository, commit |",
        "|---|---:|---:|---|---|",
    ]
    for (name, (repository, commit), path, classes), count in zip(PEERS, stored(), strict=True):
        what = f"`{path}`" + (f": {', '.join(f'`{each}`' for each in classes)}" if classes else "")
        lines.append(f"| `{name}` | {ours[name]} | {count} | {what} | {repository} `{commit[:12]}` |")
    return "\n".join(lines) + "\n"


def stored() -> list[int]:
    """Return the lines of each of `PEERS` as they were counted last."""
    return [entry["lines"] for entry in json.loads(RESULTS.read_text(encoding="utf-8"))]


def main() -> None:
    """Count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of git repositories named OWNER+NAME")
    folder = parser.parse_args().peers
    if folder is not None:
        entries = [
            {"method": name, "repository": repository, "commit": commit, "path": path, "classes": classes, "lines": n}
            for (name, (repository, commit), path, classes), n in zip(PEERS, peer_lines(folder), strict=True)
        ]
        RESULTS.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
