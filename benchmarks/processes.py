"""Two processes on two cores against one process with two threads.

    python benchmarks/processes.py

The work is a random LLaMA of 29.5 M parameters in float32, 64 samples of 512 tokens, 50 %. Both ways take turns;
medians count. Writes `benchmarks/results/processes.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workload import token_ids, write_model

from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
METRICS = ("wanda", "sparsegpt", "gblm")


def child(model: Path, metric: str, output: Path) -> None:
    """Prune in this process, or as one of several."""
    import pruneforge

    cache = output.parent / f"{output.name}-gradients"
    pruneforge.prune(model, metric, 0.5, None, token_ids().split(2), output=output, gradient_cache=cache)


def seconds(model: Path, metric: str, output: Path, processes: int) -> dict[str, float]:
    """Return seconds by stage of a run of so many processes, which share two threads."""
    child_of = [__file__, "--child", str(model), metric, str(output)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *child_of]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads((output / "pruneforge.json").read_text())["measured"]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, metric, output = arguments.child
        child(Path(model), metric, Path(output))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model)
        for metric in arguments.metrics:
            runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
            for number in range(arguments.rounds):
                for processes in runs:
                    output = Path(scratch) / f"{metric}-{processes}-{number}"
                    runs[processes].append(seconds(model, metric, output, processes))
            median = {
                f"{processes} process{'es' if processes > 1 else ''}": {
                    stage: statistics.median(run[stage] for run in found) for stage in found[0]
                }
                for processes, found in runs.items()
            }
            one, two = (found["total"] for found in median.values())
            results[metric] = {**median, "ratio": round(one / two, 3)}
            results[metric]["rounds"] = arguments.rounds
            print(metric, json.dumps(results[metric]), flush=True)
            document = {"results": results, "machine": machine(), "versions": versions()}
            (ROOT / "benchmarks" / "results" / "processes.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
