"""What methods that update weights or swap masks cost, as a multiple of Wanda's time.

    python benchmarks/solvers.py

One random LLaMA in the layout of `benchmarks/workload.py`, 576 and 1536 wide, is pruned to 50 % by all methods in
turns. Each time is the run's own, without loading and writing; medians count. Writes `benchmarks/results/solvers.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from workload import SAMPLES, TOKENS, token_ids, write_model

import pruneforge
from pruneforge.runs.provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "solvers.json"
METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"metric": "wanda"},
    "sparsegpt": {"metric": "sparsegpt"},
    "admm": {"metric": "admm"},
    "alps": {"metric": "alps"},
    "wanda, sparseswaps": {"metric": "wanda", "refine": "sparseswaps"},
    "wanda, sparsegpt": {"metric": "wanda", "refine": "sparsegpt"},
}
"""What `pruneforge.prune` is asked for; the first is what the others are compared with."""


def main() -> None:
    """Run the methods in turns and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=576, help="width; the inner one is 8/3 of it")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    shape = {"hidden_size": asked.hidden, "intermediate_size": asked.hidden * 8 // 3, "num_hidden_layers": asked.blocks}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory(prefix="pruneforge-solvers-") as folder:
        model = write_model(Path(folder) / "model", **shape)
        batches = token_ids(asked.samples, asked.tokens).split(2)
        for _ in range(asked.rounds):
            for name, method in METHODS.items():
                found = pruneforge.prune(model, sparsity=0.5, calibration=batches, **method)
                runs[name].append(found.report["measured"]["seconds"])
                print(name, runs[name][-1], flush=True)
    seconds = {name: [round(run["total"], 3) for run in found] for name, found in runs.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "machine": machine(),
        "versions": versions(),
        "model": shape,
        "samples": asked.samples,
        "tokens": asked.tokens,
        "seconds": medians,
        "all_seconds": seconds,
        "times_wanda": {name: round(value / medians["wanda"], 2) for name, value in medians.items()},
        "stages": {name: found[-1] for name, found in runs.items()},
    }
    asked.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["times_wanda"], indent=2))


if __name__ == "__main__":
    main()
