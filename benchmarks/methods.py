"""Every first-party method on a pretrained LLaMA-2: perplexity, layer error, seconds and memory.

The model is stories260K (Karpathy's tinyllamas in the transformers layout), the text an excerpt of TinyStories; neither
is part of the repository. Calibration draws from the first half of the text, three times with other seeds, perplexity
is measured on the second half. Run

    python benchmarks/methods.py --data DIR

with a folder that holds `stories260K/` and `tinystories.txt`. Writes `benchmarks/results/methods.json` and
`docs/results/methods.md`. With `--methods NAME ...` only those are measured, and the others' rows stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pruneforge
from pruneforge import Gram, Layer, LayerStatistics, Metric
from pruneforge.progress import BarProgress
from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
PATTERNS: tuple[float | str, ...] = (0.5, 0.6, 0.7, "2:4")
SEEDS = (0, 1, 2)
SAMPLES, SEQLEN, WINDOW = 64, 256, 512
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"metric": "magnitude"},
    "random": {"metric": "random"},
    "Wanda": {"metric": "wanda"},
    "SparseGPT": {"metric": "sparsegpt"},
    "GBLM": {"metric": "gblm"},
    "RIA": {"metric": "ria"},
    "RIA, row": {"metric": "ria", "options": {"scope": "row"}},
    "Wanda++, score": {"metric": "wanda++"},
    "ADMM": {"metric": "admm"},
    "Wanda, OWL": {"metric": "wanda", "allocator": "owl"},
    "Wanda, SparseSwaps": {"metric": "wanda", "refine": "sparseswaps"},
    "magnitude, ridge": {"metric": "magnitude", "recover": "ridge"},
    "Wanda, ridge": {"metric": "wanda", "recover": "ridge"},
    "magnitude, reconstruct": {"metric": "magnitude", "recover": "reconstruct"},
    "Wanda, reconstruct": {"metric": "wanda", "recover": "reconstruct"},
    "SparseGPT, reconstruct": {"metric": "sparsegpt", "recover": "reconstruct"},
}
"""What `pruneforge.prune` is asked for, by what the table calls it; options are the published defaults."""

ROW_SCOPE = {"RIA, row": {}}
"""Options with N:M, which compares within groups and takes no scope."""


class Collected(Metric):
    """Keeps the dense weights and Gram matrices of all layers; what it prunes is of no interest."""

    requires = (Gram,)

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def score(self, layer: Layer, stats: LayerStatistics) -> torch.Tensor:
        """Keep what was collected, and score by the weight."""
        self.layers[layer.name] = (layer.weight.double(), stats[Gram].total.double())
        return layer.weight.abs()

    def error(self, model: nn.Module) -> float:
        """Return the mean over layers of `||X (W - W')^T||^2 / ||X W^T||^2`, with X the dense model's inputs."""
        errors = []
        for name, (dense, gram) in self.layers.items():
            lost = dense - model.get_submodule(name).weight.detach().double()  # type: ignore[operator]
            errors.append(float(((lost @ gram) * lost).sum() / ((dense @ gram) * dense).sum()))
        return statistics.mean(errors)


def measure(data: Path, methods: Sequence[str]) -> dict[str, Any]:
    """Prune and evaluate methods at every pattern with every draw."""
    model, text = data / "stories260K", data / "tinystories.txt"
    calibration, held_out = f"{text}[:50%]", f"{text}[50%:]"
    setup = {"samples": SAMPLES, "seqlen": SEQLEN}
    reference = Collected()
    pruneforge.prune(model, reference, 0.5, None, calibration, propagate="dense", **setup)
    dense = pruneforge.evaluate(model, "perplexity", data=held_out, window=WINDOW)
    rows = []
    jobs = [(name, pattern, seed) for name in methods for pattern in PATTERNS for seed in SEEDS]
    for name, pattern, seed in BarProgress().track(jobs, "methods"):
        asked = dict(METHODS[name])
        sparsity, text_pattern = (None, pattern) if isinstance(pattern, str) else (pattern, None)
        if isinstance(pattern, str) and name in ROW_SCOPE:
            asked["options"] = ROW_SCOPE[name]
        result = pruneforge.prune(
            model, sparsity=sparsity, pattern=text_pattern, calibration=calibration, seed=seed, **asked, **setup
        )
        found = pruneforge.evaluate(result, "perplexity", data=held_out, window=WINDOW)
        measured = result.report["measured"]
        rows.append(
            {
                "method": name,
                "pattern": str(pattern),
                "seed": seed,
                "perplexity": found["perplexity"],
                "layer_error": reference.error(result.model),
                "seconds": measured["seconds"]["total"],
                "peak_bytes": measured["peak_memory"]["host_bytes"],
                "sparsity": result.report["sparsity"]["reached"],
                "warnings": result.report["warnings"],
            }
        )
    described = {**setup, "seeds": list(SEEDS), "window": WINDOW, "tokens": dense["tokens"], "dtype": "float32"}
    return {
        "setup": described,
        "dense": dense["perplexity"],
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }


def page(results: dict[str, Any]) -> str:
    """Return `docs/results/methods.md`."""
    setup, where = results["setup"], results["machine"]
    lines = [
        "# Methods compared",
        "",
        "Made by `python benchmarks/methods.py --data DIR`; the numbers are in "
        "[`benchmarks/results/methods.json`](../../benchmarks/results/methods.json).",
        "",
        "stories260K, a LLaMA-2 of 260 K parameters, on TinyStories: perplexity over "
        f"{setup['tokens']:,} tokens of held-out text in windows of {setup['window']}, mean and standard deviation of "
        f"{len(setup['seeds'])} calibration draws of {setup['samples']} samples of {setup['seqlen']} tokens from the "
        f"other half of the text. Dense: **{results['dense']:.2f}**. Every part with its defaults. Lower is better. A "
        "model this small has little to spare, so differences are larger than in models that people use.",
        "",
        "## Perplexity",
        "",
        *_table(results, "perplexity", "{:.1f}"),
        "",
        "## Layer error",
        "",
        "Mean over layers of `||X (W - W')^T||^2 / ||X W^T||^2`, with X the inputs in the dense model. It is not what "
        "a method that looks at pruned inputs, or at the block's output, makes small.",
        "",
        *_table(results, "layer_error", "{:.3f}"),
        "",
        "## Cost",
        "",
        "Mean seconds of a run and highest peak of resident memory, all patterns and draws; loading and evaluation "
        "left out of the seconds.",
        "",
        "| method | seconds | peak memory, MB |",
        "|---|---:|---:|",
        *(
            f"| {name} | {statistics.mean(row['seconds'] for row in own):.2f} "
            f"| {max(row['peak_bytes'] for row in own) / 1e6:.0f} |"
            for name, own in _by_method(results).items()
        ),
        "",
        f"Machine: {where['processor']}, {where['cores']} cores, {where['threads']} threads, "
        f"{', '.join(where['accelerators']) or 'no accelerator'}; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}.",
        "",
    ]
    return "\n".join(lines)


def _by_method(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    names = dict.fromkeys(row["method"] for row in results["rows"])
    return {name: [row for row in results["rows"] if row["method"] == name] for name in names}


def _table(results: dict[str, Any], key: str, form: str) -> list[str]:
    patterns = list(dict.fromkeys(row["pattern"] for row in results["rows"]))
    heads = [pattern if ":" in pattern else f"{float(pattern):.0%}" for pattern in patterns]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, own in _by_method(results).items():
        cells = []
        for pattern in patterns:
            values = [row[key] for row in own if row["pattern"] == pattern]
            cells.append(f"{form.format(statistics.mean(values))} ± {form.format(statistics.pstdev(values))}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260K/ and tinystories.txt")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    asked = parser.parse_args()
    results, file = measure(asked.data, asked.methods), ROOT / "benchmarks" / "results" / "methods.json"
    if file.exists():
        others = [row for row in json.loads(file.read_text())["rows"] if row["method"] not in asked.methods]
        order = list(METHODS)
        results["rows"] = sorted([*others, *results["rows"]], key=lambda row: order.index(row["method"]))
    file.write_text(json.dumps(results, indent=2) + "\n")
    (ROOT / "docs" / "results" / "methods.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
