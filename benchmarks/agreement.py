"""Whether PruneForge prunes what the research repositories' loop prunes, and what moves the masks where it does not.

    python benchmarks/agreement.py

The model of `benchmarks/workload.py`, 16 of its samples, 50 %. The plain loop runs as the repositories have it, which
prunes one weight too many wherever it chooses one threshold for many rows, and with exact counts; in float32, whose
rounding differs with the order of sums, and in float64. Writes `benchmarks/results/agreement.json`, and the page.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import plain_loop
import speed_page
from torch import Tensor
from workload import token_ids, write_model

import pruneforge
from pruneforge.runs.provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "agreement.json"
METRICS = ("magnitude", "wanda", "sparsegpt", "gblm")
SAMPLES, SPARSITY = 16, 0.5


def kept_by_plain(model: Path, metric: str, dtype: str, extra: int) -> dict[str, Tensor]:
    """Return the masks of the plain loop, by layer."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    plain_loop.prune(loaded, metric, token_ids(SAMPLES), SPARSITY, extra)
    return {name: layer.weight != 0 for name, layer in plain_loop.layers(loaded).items() if "lm_head" not in name}


def agreement(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[float]:
    """Return the share of weights that both keep or both prune, block by block."""
    same: dict[int, list[float]] = {}
    for name, kept in theirs.items():
        block = same.setdefault(int(name.split(".")[2]), [0.0, 0.0])
        block[0] += int((kept == ours[name]).sum())
        block[1] += kept.numel()
    return [equal / total for _, (equal, total) in sorted(same.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "metrics": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model")
        for metric in arguments.metrics:
            found: dict[str, list[float]] = {}
            for dtype in ("float32", "float64"):
                batches = token_ids(SAMPLES).split(2)
                ours = pruneforge.prune(model, metric, SPARSITY, None, batches, dtype=dtype).masks
                for extra, counts in enumerate(("exact", "theirs")):
                    found[f"{dtype}, {counts}"] = agreement(ours, kept_by_plain(model, metric, dtype, extra))
                    print(metric, dtype, counts, found[f"{dtype}, {counts}"], flush=True)
            document["metrics"][metric] = found
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    speed_page.write()


if __name__ == "__main__":
    main()
