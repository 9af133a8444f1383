"""Perplexity of a pretrained LLaMA-2 pruned by every metric, at four settings.

The model is stories260K (Karpathy's tinyllamas in the transformers layout), the text an excerpt of
TinyStories; neither is part of the repository. Calibration draws from the first half of the text,
perplexity is measured on the second. Run

    python benchmarks/fidelity.py --data DIR

with a folder that holds `stories260K/` and `tinystories.txt`. Writes `benchmarks/results/fidelity.json` and
`docs/results/fidelity.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pruneforge
from pruneforge.interfaces.statistics import streams_of
from pruneforge.plugins import loaded_plugins
from pruneforge.progress import BarProgress
from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
SETTINGS: tuple[tuple[float, str | None], ...] = ((0.5, None), (0.6, None), (0.5, "2:4"), (0.5, "4:8"))
PAPERS_ORDER = ("magnitude", "wanda", "sparsegpt", "gblm")


def measure(data: Path) -> dict[str, Any]:
    """Prune and evaluate every combination."""
    model, text = data / "stories260K", data / "tinystories.txt"
    held_out = f"{text}[50%:]"
    dense = pruneforge.evaluate(model, "perplexity", data=held_out, window=512)
    rows = [{"metric": "dense", "pattern": "", "sparsity": 0.0, "perplexity": dense["perplexity"]}]
    registry = loaded_plugins().registry
    metrics = [entry.name for entry in registry.entries("metric")]
    metrics = [name for name in metrics if not streams_of(registry.create("metric", name).requires)]  # one text alone
    metrics.sort(key=lambda name: PAPERS_ORDER.index(name) if name in PAPERS_ORDER else len(PAPERS_ORDER))
    jobs = [(metric, setting) for metric in metrics for setting in SETTINGS]
    for metric, (sparsity, pattern) in BarProgress().track(jobs, "fidelity"):
        exclude = ["*.down_proj"] if pattern == "4:8" else []  # its 172 inputs are no multiple of 8
        result = pruneforge.prune(
            model, metric, sparsity, pattern, f"{text}[:50%]", samples=64, seqlen=256, exclude=exclude
        )
        found = pruneforge.evaluate(result, "perplexity", data=held_out, window=512)
        assert found["warnings"] == [], found["warnings"]
        rows.append(
            {
                "metric": metric,
                "pattern": result.report["pattern"]["pattern"],
                "sparsity": result.report["sparsity"]["reached"],
                "perplexity": found["perplexity"],
                "excluded": len(result.report["excluded"]),
                "seconds": result.report["measured"]["seconds"]["total"],
                "warnings": result.report["warnings"],
            }
        )
    setup = {"samples": 64, "seqlen": 256, "seed": 0, "window": 512, "tokens": dense["tokens"], "dtype": "float32"}
    return {"setup": setup, "rows": rows, "machine": machine(), "versions": versions()}


def table(results: dict[str, Any]) -> str:
    """Return `docs/results/fidelity.md`."""
    rows = results["rows"]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows[1:]))
    lines = [
        "# Perplexity after pruning",
        "",
        "Made by `python benchmarks/fidelity.py --data DIR`; the numbers are in "
        "[`benchmarks/results/fidelity.json`](../../benchmarks/results/fidelity.json).",
        "",
        "## stories260K, a LLaMA-2 of 260 K parameters, on TinyStories",
        "",
        f"Perplexity over {results['setup']['tokens']:,} tokens of held-out text in windows of "
        f"{results['setup']['window']}; dense: **{rows[0]['perplexity']:.2f}**. Calibration: "
        f"{results['setup']['samples']} samples of {results['setup']['seqlen']} tokens from the other half of the "
        "text, seed 0. Every metric with its published defaults. Lower is better.",
        "",
        "| metric | " + " | ".join(f"{float(p):.0%}" if ":" not in p else p for p in patterns) + " | seconds |",
        "|---|" + "---:|" * (len(patterns) + 1),
    ]
    for metric in dict.fromkeys(row["metric"] for row in rows[1:]):
        own = {row["pattern"]: row for row in rows if row["metric"] == metric}
        seconds = sum(row["seconds"] for row in own.values()) / len(own)
        cells = " | ".join(f"{own[pattern]['perplexity']:.2f}" for pattern in patterns)
        lines.append(f"| {metric} | {cells} | {seconds:.1f} |")
    where = results["machine"]
    partial = {row["pattern"]: row for row in rows[1:] if row["excluded"]}
    lines += [
        "",
        *(
            f"With {pattern}, {row['excluded']} layers stay dense (172 inputs are no multiple of 8): "
            f"{row['sparsity']:.1%} of the weights are pruned."
            for pattern, row in partial.items()
        ),
        "",
        f"Machine: {where['processor']}, {where['cores']} cores, {where['threads']} threads, "
        f"{', '.join(where['accelerators']) or 'no accelerator'}; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}. Seconds are the mean of a run, loading left out.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260K/ and tinystories.txt")
    results = measure(parser.parse_args().data)
    (ROOT / "benchmarks" / "results" / "fidelity.json").write_text(json.dumps(results, indent=2) + "\n")
    (ROOT / "docs" / "results" / "fidelity.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
