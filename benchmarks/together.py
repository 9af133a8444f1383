"""What four metrics at four sparsities cost in one pass, beside the dearest of them alone.

    python benchmarks/together.py

The work is that of `benchmarks/workload.py`. All take turns, gradients are computed anew each time, and medians count.
Writes `benchmarks/results/together.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from workload import token_ids, write_model

import pruneforge
from pruneforge.runs.provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "together.json"
METRICS = ("magnitude", "wanda", "sparsegpt", "gblm")
SPARSITIES = (0.5, 0.55, 0.6, 0.7)
CASES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "gblm alone": (("gblm",), (0.5,)),
    "four metrics": (METRICS, (0.5,)),
    "four metrics at four sparsities": (METRICS, SPARSITIES),
    "gblm at four sparsities": (("gblm",), SPARSITIES),
}


def main() -> None:
    """Run the cases in turns and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    asked = parser.parse_args()
    rounds, cases = asked.rounds, {case: CASES[case] for case in asked.cases}
    with tempfile.TemporaryDirectory(prefix="pruneforge-together-") as name:
        folder = Path(name)
        model, batches = write_model(folder / "model"), token_ids().split(2)
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        stages: dict[str, dict[str, float]] = {}
        for _ in range(rounds):
            for case, (metrics, sparsities) in cases.items():
                cache, output = folder / "cache", folder / "out"
                start = time.perf_counter()
                made = pruneforge.prune_each(
                    model, list(metrics), list(sparsities), batches, output=output, gradient_cache=cache
                )
                seconds[case].append(time.perf_counter() - start)
                stages[case] = next(iter(made.values())).report["measured"]["seconds"]
                shutil.rmtree(output)
                shutil.rmtree(cache)
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    results = {
        "machine": machine(),
        "versions": versions(),
        "rounds": rounds,
        "seconds": {case: round(value, 3) for case, value in medians.items()},
        "all_seconds": {case: [round(value, 3) for value in values] for case, values in seconds.items()},
        "times_gblm_alone": {case: round(value / medians["gblm alone"], 3) for case, value in medians.items()},
        "stages": stages,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["times_gblm_alone"], indent=2))


if __name__ == "__main__":
    main()
