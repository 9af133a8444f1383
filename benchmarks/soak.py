"""Hundreds of runs: one process's memory and handles stay flat, results the same, and processes end in order.

    python benchmarks/soak.py --runs 200 --pairs 200

Writes `benchmarks/results/soak.json`. Fails if memory or handles grow, if two results differ, or if a process ends with
anything but 0. A tokenizer that transformers makes anew leaves memory behind, with nothing of PruneForge in it; that is
measured beside, and what a run adds counts beyond it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "soak.json"
GROWTH = 1 << 20
"""Bytes of memory a run at most that the last runs may take more than the earlier ones: none but noise of pages."""

SETTINGS = {"sparsity": 0.5, "calibration": "python-docs", "samples": 4, "seqlen": 64}
METRICS = ("wanda", "sparsegpt", "gblm")
WARM_UP = 20
"""Runs until caches are filled."""

TOKENIZERS = 60
"""Tokenizers that are made alone, to measure what each leaves behind."""


def main() -> None:
    """Run both parts, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs in one process")
    parser.add_argument("--pairs", type=int, default=200, help="runs of two processes")
    parser.add_argument("--only", choices=PARTS, help="run one part, and keep what was found of the other")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    counts = {"in_one_process": asked.runs, "of_two_processes": asked.pairs}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from pruneforge.runs.provenance import machine, versions

    with tempfile.TemporaryDirectory(prefix="pruneforge-soak-") as folder:
        found: dict[str, Any] = json.loads(asked.output.read_text()) if asked.only and asked.output.exists() else {}
        for name, part in PARTS.items():
            if asked.only in (None, name):
                found[name] = part(counts[name], Path(folder)) | {"machine": machine(), "versions": versions()}
    asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    problems = [problem for part in found.values() for problem in part["problems"]]
    if problems:
        sys.exit("; ".join(problems))


def in_one_process(runs: int, folder: Path) -> dict[str, Any]:
    """Prune and evaluate again and again, streamed and in memory in turn, by each metric in turn."""
    import pruneforge
    from pruneforge.memory import resident_bytes
    from pruneforge.plugins import loaded_plugins

    model = loaded_plugins().registry.create("demo", "text").checkpoint()
    outcomes: dict[tuple[str, bool], Counter[str]] = {}
    memory, handles, threads = [], [], []
    for number in range(runs):
        metric, streamed = METRICS[number % len(METRICS)], number // len(METRICS) % 2 == 0
        output = folder / "output" / str(number) if streamed else None
        result = pruneforge.prune(model, metric, **SETTINGS, output=output)
        digest = hashlib.sha256()
        for name, mask in sorted(result.masks.items()):
            digest.update(name.encode() + mask.numpy().tobytes())
        perplexity = pruneforge.evaluate(result, "perplexity", data="python-docs", window=64, limit=2)["perplexity"]
        outcomes.setdefault((metric, streamed), Counter())[f"{digest.hexdigest()[:16]} {perplexity!r}"] += 1
        del result
        gc.collect()
        memory.append(resident_bytes())
        handles.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
    first, last = memory[WARM_UP : WARM_UP + (runs - WARM_UP) // 2], memory[WARM_UP + (runs - WARM_UP) // 2 :]
    growth = (statistics.mean(last) - statistics.mean(first)) / max(1, len(last))
    alone = of_tokenizers_alone(model)
    problems = [f"{name} gave {len(seen)} different results" for name, seen in outcomes.items() if len(seen) > 1]
    problems += [f"memory grew by {growth - alone:,.0f} bytes a run"] if growth - alone > GROWTH else []
    problems += ["handles grew"] if max(handles[-10:]) > max(handles[WARM_UP : WARM_UP + 10]) else []
    problems += ["threads grew"] if threads[-1] > threads[WARM_UP] else []
    return {
        "runs": runs,
        "memory_mib": {"after_warm_up": memory[WARM_UP] >> 20, "largest": max(memory) >> 20, "last": memory[-1] >> 20},
        "growth_bytes_a_run": round(growth),
        "growth_bytes_a_tokenizer_alone": round(alone),
        "handles": {"after_warm_up": handles[WARM_UP], "last": handles[-1]},
        "threads": {"after_warm_up": threads[WARM_UP], "last": threads[-1]},
        "problems": problems,
    }


def of_tokenizers_alone(model: Path) -> float:
    """Return the bytes that each tokenizer leaves behind which transformers makes anew for the same text."""
    from transformers import AutoTokenizer

    from pruneforge.memory import resident_bytes
    from pruneforge.plugins import loaded_plugins

    text = "\n\n".join(loaded_plugins().registry.create("source", "python-docs").documents("calibration"))
    memory = []
    for _ in range(TOKENIZERS):
        AutoTokenizer.from_pretrained(model)(text, verbose=False)
        gc.collect()
        memory.append(resident_bytes())
    third = TOKENIZERS // 3
    return (statistics.mean(memory[-third:]) - statistics.mean(memory[third : 2 * third])) / third


def of_two_processes(runs: int, folder: Path) -> dict[str, Any]:
    """Prune by two processes again and again, and count how they end."""
    ends: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    for number in range(runs):
        output = folder / "pairs" / str(number)
        asked = ["prune", "demo:text", "--metric", METRICS[number % 3], *settings, "--output", str(output), "--quiet"]
        done = subprocess.run([*torchrun, "-m", "pruneforge", *asked], capture_output=True, text=True, check=False)
        ends[str(done.returncode)] += 1
        if done.returncode:
            sys.stderr.write(done.stderr)
            continue
        content = (output / "model.safetensors").read_bytes() + (output / "pruneforge.masks").read_bytes()
        outcomes[f"{METRICS[number % 3]} {hashlib.sha256(content).hexdigest()[:16]}"] += 1
    problems = [f"{count} ended with {code}" for code, count in ends.items() if code != "0"]
    problems += ["results differ"] if len(outcomes) > len(METRICS) else []
    return {"runs": runs, "ends": dict(ends), "problems": problems}


PARTS = {"in_one_process": in_one_process, "of_two_processes": of_two_processes}


if __name__ == "__main__":
    main()
