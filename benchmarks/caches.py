"""Perplexity of language models whose key-value caches are pruned, by rule, and the bytes that a cache takes.

    python benchmarks/caches.py demo:text=python-docs models/llama=wikitext-2/test.txt

Each argument is a model and the text to measure it on. Keys and values lose 70 %, but for a window of 8 or of 32 recent
tokens. Writes `benchmarks/results/caches.json` and `docs/results/caches.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from outcome import made_on, with_machine, write

import pruneforge
from pruneforge_mustafar.bitmap import compress
from pruneforge_mustafar.rules import Pruning

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "caches.json", ROOT / "docs" / "results" / "caches.md"
RULES: dict[str, dict[str, Any]] = {
    "by token": {},
    "by token, keys alone": {"values": 0.0},
    "by token, values alone": {"keys": 0.0},
    "by token, 50 %": {"keys": 0.5, "values": 0.5},
    "by token, keys times queries": {"key_rule": "output"},
    "by channel": {"key_rule": "channel", "value_rule": "channel"},
    "whole channels": {"key_rule": "structured", "value_rule": "structured"},
    "at random (control)": {"key_rule": "random", "value_rule": "random"},
}
RECENT = (8, 32)
HEAD = """# Pruned key-value caches

Made by `python benchmarks/caches.py`. Perplexity of language models whose keys and values are pruned once they leave a
window of recent tokens (`pruneforge eval MODEL --task kv-perplexity`, after Mustafar, Joo et al., 2025), and its change
from the dense cache. 70 % of each are pruned unless the row says otherwise. At random is the control.
"""
BYTES = """## Bytes

Of random keys and values of 128 channels, 70 % of them pruned by token, in the bitmap format (tiles of 64 entries: a
bit for each, the entries that are there, filled up to a multiple of 8, and an offset), as a share of the dense float16:
"""


def measured(model: str, data: str, window: int, limit: int) -> dict[str, Any]:
    """Return the perplexities of a model by rule, for each window of recent tokens."""
    asked = {"data": data, "window": window, "limit": limit}
    dense = pruneforge.evaluate(model, "perplexity", **asked)
    found: dict[str, Any] = {"window": window, "windows": dense["windows"], "dense": dense["perplexity"], "rules": {}}
    for recent in RECENT:
        for name, options in RULES.items():
            value = pruneforge.evaluate(model, "kv-perplexity", recent=recent, **asked, **options)["perplexity"]
            found["rules"].setdefault(name, {})[str(recent)] = value
            print(model, recent, name, f"{value:.3f} {value / dense['perplexity'] - 1:+.1%}", flush=True)
    return found


def page(document: dict[str, Any]) -> str:
    """Return the page of the results."""
    lines = [HEAD]
    for model, found in document["models"].items():
        lines += [
            f"## {model}",
            "",
            f"Dense {found['dense']:.2f}; {found['windows']} windows of {found['window']} tokens.",
            "",
            f"| rule | {' | '.join(f'{recent} recent tokens' for recent in RECENT)} |",
            f"|---|{'---:|' * len(RECENT)}",
        ]
        for rule, values in found["rules"].items():
            cells = [f"{value:.2f} ({value / found['dense'] - 1:+.1%})" for value in values.values()]
            lines.append(f"| {rule} | {' | '.join(cells)} |")
        lines.append("")
    lines += [BYTES, *(f"- {name}: {share:.1%}" for name, share in document["bytes"].items()), ""]
    lines.append(made_on(document, "torch", "transformers"))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL=DATA")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, default=16, help="windows of text")
    asked = parser.parse_args()
    models = {}
    for pair in asked.models:
        model, _, data = pair.partition("=")
        models[model.rpartition("/")[2]] = measured(model, data, asked.window, asked.limit)
    states = torch.randn(1, 8, 1024, 128, generator=torch.Generator().manual_seed(0))
    pruned = Pruning(0.7).prune(states).half()
    shares = {name: compress(pruned, along).nbytes / pruned.nbytes for name, along in (("keys", 2), ("values", 3))}
    document = with_machine({"models": models, "bytes": shares})
    write(document, RESULTS, page(document), PAGE)


if __name__ == "__main__":
    main()
