"""PruneForge against llm-compressor, a plain loop, and the machine's own floor.

    make bench

The work is that of `benchmarks/workload.py`. Contenders take turns, every run is a process of its own, and medians
count. Agreement is the share of weights that another contender prunes or keeps as PruneForge does. Writes
`benchmarks/results/speed.json` after each metric, and `docs/results/speed.md` from it and
`benchmarks/results/costs.json`.

    python benchmarks/speed.py --before CHECKOUT --metrics NAME

compares with another checkout of PruneForge alone, in turns, and writes `benchmarks/results/before.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import speed_page
from safetensors import safe_open
from workload import write_model

from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results" / "speed.json"
BEFORE = HERE / "results" / "before.json"
METRICS = ("magnitude", "wanda", "sparsegpt", "gblm")
PEER = {"wanda", "sparsegpt"}


def call(python: Path | str, script: str, *arguments: Any, checkout: Path = ROOT) -> dict[str, Any]:
    """Run a script, with the packages of a checkout, and return the JSON of its last line."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(checkout), str(checkout / "plugins")])
    command = [str(python), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(ours: Path, theirs: Path) -> float:
    """Return the share of the blocks' weights that both zero or both keep."""
    same, total = 0, 0
    with safe_open(ours / "model.safetensors", "pt") as a, safe_open(theirs / "model.safetensors", "pt") as b:
        for name in a.keys():  # noqa: SIM118 - not a mapping
            if name.endswith("proj.weight"):
                equal = (a.get_tensor(name) == 0) == (b.get_tensor(name) == 0)
                same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


def contenders(metric: str, peers: Path | None) -> dict[str, tuple[str, Path | str]]:
    """Return who is compared for a metric, PruneForge first: what `benchmarks/contenders.py` calls it, and a Python."""
    found: dict[str, tuple[str, Path | str]] = {
        "pruneforge": ("pruneforge", sys.executable),
        "plain": ("plain", sys.executable),
    }
    if peers is not None and metric in PEER:
        found["llm-compressor"] = ("llm-compressor", peers)
        found["pruneforge on llm-compressor's libraries"] = ("pruneforge", peers)
    return found


def compare(metric: str, model: Path, scratch: Path, peers: Path | None, rounds: int) -> dict[str, Any]:
    """Return medians of each contender for one metric, and how far their masks agree with PruneForge's."""
    racing = contenders(metric, peers)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in racing}
    agreed: dict[str, float] = {}
    for number in range(rounds):
        for name, (who, python) in racing.items():
            output = scratch / f"{metric}-{name}"
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(output.with_suffix(".cache"), ignore_errors=True)
            runs[name].append(call(python, "contenders.py", who, metric, model, output))
            print(metric, number, name, runs[name][-1], flush=True)
            if name != "pruneforge" and number == 0:
                agreed[name] = agreement(scratch / f"{metric}-pruneforge", output)
    return {
        name: {
            **{key: statistics.median(run[key] for run in found) for key in found[0] if key != "stages"},
            "all_seconds": [round(run["seconds"], 2) for run in found],
            **({"stages": found[-1]["stages"]} if found[-1]["stages"] else {}),
            **({"agreement": agreed[name]} if name in agreed else {}),
        }
        for name, found in runs.items()
    }


def compare_with(checkout: Path, metrics: list[str], rounds: int) -> None:
    """Time this checkout and another one in turns, and write how many times as long as before it takes."""
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "commits": {}, "metrics": {}}
    for name, where in (("before", checkout), ("now", ROOT)):
        command = ["git", "-C", str(where), "rev-parse", "--short", "HEAD"]
        document["commits"][name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model")
        for metric in metrics:
            taken: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
            for _ in range(rounds):
                for name, where in (("before", checkout.resolve()), ("now", ROOT)):
                    output = Path(scratch) / name
                    shutil.rmtree(output, ignore_errors=True)
                    shutil.rmtree(output.with_suffix(".cache"), ignore_errors=True)
                    run = call(sys.executable, "contenders.py", "pruneforge", metric, model, output, checkout=where)
                    taken[name].append(run)
                    print(metric, name, run["seconds"], flush=True)
            seconds = {name: [round(run["seconds"], 2) for run in runs] for name, runs in taken.items()}
            ratios = [now / before for now, before in zip(seconds["now"], seconds["before"], strict=True)]
            same = agreement(Path(scratch) / "before", Path(scratch) / "now")
            document["metrics"][metric] = {**seconds, "ratio": statistics.median(ratios), "agreement": same}
            document["metrics"][metric]["stages"] = {name: runs[-1]["stages"] for name, runs in taken.items()}
            BEFORE.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="Python of an environment that has benchmarks/peers.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--before", type=Path, help="another checkout to compare with, and with nothing else")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    if arguments.page:
        speed_page.write()
        return
    if arguments.before is not None:
        compare_with(arguments.before, arguments.metrics, arguments.rounds)
        return
    if arguments.peers is None:
        print("no --peers: llm-compressor is left out", file=sys.stderr)
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "peers": {}, "rounds": arguments.rounds}
    if arguments.peers is not None:
        listed = subprocess.run([arguments.peers, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
        wanted = ("llmcompressor", "torch", "transformers", "compressed-tensors")
        document["peers"] = dict(line.split("==") for line in listed.stdout.split() if line.split("==")[0] in wanted)
    document["metrics"] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model")
        for metric in arguments.metrics:
            before = call(sys.executable, "floor.py")
            found = compare(metric, model, Path(scratch), arguments.peers, arguments.rounds)
            after = call(sys.executable, "floor.py")
            floor = {key: (before[key] + after[key]) / 2 for key in before}  # the machine may have changed meanwhile
            document["metrics"][metric] = {**found, "floor": floor}
            RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    speed_page.write()


if __name__ == "__main__":
    main()
