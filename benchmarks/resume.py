"""Kill -9 at random instants of a run, and compare what the resumed run writes with an unbroken one.

    python benchmarks/resume.py

Prunes the embedded language model; each run is a process of its own that is killed after a random share of the time
that an unbroken run takes from its journal's first line to its end, and resumed by another. Writes
`benchmarks/results/resume.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
METRICS = ("gblm", "sparsegpt", "wanda")


def prune(metric: str, folder: Path, resume: bool) -> None:
    import pruneforge

    pruneforge.prune(
        "demo:text",
        metric,
        0.5,
        None,
        "python-docs",
        samples=16,
        seqlen=128,
        output=folder / "out",
        gradient_cache=folder / "gradients",
        resume=resume,
    )


def begun(process: Any, folder: Path) -> None:
    """Wait until a run has begun its journal, or is over."""
    while process.is_alive() and not (folder / "out" / "journal.jsonl").exists():
        time.sleep(0.002)


def contents(folder: Path) -> dict[str, Any]:
    """Return every file of an output, the report without what was measured."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found["pruneforge.json"])
    del report["measured"]
    return {**found, "pruneforge.json": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pruneforge.runs.job", "transformers.models.llama.modeling_llama", "datasets"])
    chance = random.Random(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        unbroken: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for metric in METRICS:
            for attempt in range(2):  # the first one warms caches up
                folder = Path(scratch) / f"{metric}-{attempt}"
                process = processes.Process(target=prune, args=(metric, folder, False))
                process.start()
                begun(process, folder)
                start = time.perf_counter()
                process.join()
                assert process.exitcode == 0
                seconds[metric] = time.perf_counter() - start
            unbroken[metric] = contents(folder / "out")
        for number in range(arguments.kills):
            metric = METRICS[number % len(METRICS)]
            folder = Path(scratch) / f"killed-{number}"
            after = chance.uniform(0, seconds[metric])
            process = processes.Process(target=prune, args=(metric, folder, False))
            process.start()
            begun(process, folder)
            process.join(after)
            process.kill()
            process.join()
            journal = folder / "out" / "journal.jsonl"
            blocks = sum('"block"' in line for line in journal.read_text().splitlines()) if journal.exists() else None
            resumed = processes.Process(target=prune, args=(metric, folder, True))
            resumed.start()
            resumed.join()
            same = resumed.exitcode == 0 and contents(folder / "out") == unbroken[metric]
            rows.append(
                {
                    "metric": metric,
                    "killed_after": round(after, 3),
                    "of_seconds": round(seconds[metric], 3),
                    "finished_blocks": blocks,
                    "identical": same,
                }
            )
            print(rows[-1], flush=True)
    results = {
        "kills": len(rows),
        "identical": sum(row["identical"] for row in rows),
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    (ROOT / "benchmarks" / "results" / "resume.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{results['identical']} of {results['kills']} resumed runs have identical bytes")
    raise SystemExit(results["identical"] != results["kills"])


if __name__ == "__main__":
    main()
