"""Whether PruneForge prunes what the research repositories' loop prunes, and what moves the masks where it does not.

    python benchmarks/agreement.py
    python benchmarks/agreement.py --model models/llama --text wikitext-2/valid.txt

The model of `benchmarks/workload.py`, 16 of its samples, 50 %. The plain loop runs as the repositories have it, which
prunes one weight too many wherever it chooses one threshold for many rows, and with exact counts; in float32, whose
rounding differs with the order of sums, and in float64. Writes `benchmarks/results/agreement.json`, and the page.

With `--model`, Wanda on a pretrained LLaMA in float32, in batches of one sequence, as the repositories have it, and of
the default size, at 50 % and 2:4, on one thread; adds `pretrained` to the same file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import plain_loop
import speed_page
import torch
from torch import Tensor
from workload import token_ids, write_model

import pruneforge
from pruneforge.memory import TOKENS_ON_CPU
from pruneforge.runs.provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "agreement.json"
METRICS = ("magnitude", "wanda", "sparsegpt", "gblm")
SAMPLES, SPARSITY, LENGTH = 16, 0.5, 512
PATTERNS: dict[str, tuple[int, int] | None] = {"0.5": None, "2:4": (2, 4)}
"""By the pattern's name, how many of how many weights are pruned."""


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


def pretrained(model: Path, text: Path) -> dict[str, Any]:
    """Return the share of weights that both prune or keep, by pattern and by samples a batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # with more, products are split as the load of the machine has it, and round differently
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    samples = ids[0, : SAMPLES * LENGTH].view(SAMPLES, LENGTH)
    usual = max(1, TOKENS_ON_CPU // LENGTH)
    found: dict[str, dict[str, float]] = {}
    for pattern, groups in PATTERNS.items():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
        plain_loop.prune(loaded, "wanda", samples, SPARSITY, groups=groups)
        parameters = sum(parameter.numel() for parameter in loaded.parameters())
        theirs = {name: layer.weight != 0 for name, layer in plain_loop.layers(loaded.model).items()}
        # Weights that are zero in the dense model already are pruned in both, whatever a mask says.
        dense = AutoModelForCausalLM.from_pretrained(model, dtype="float32").model
        there = {name: layer.weight != 0 for name, layer in plain_loop.layers(dense).items()}
        for size in (1, usual):
            asked = {"pattern": pattern} if groups else {"sparsity": float(pattern)}
            batches = samples.split(size)
            ours = pruneforge.prune(model, "wanda", calibration=batches, dtype="float32", device="cpu", **asked).masks
            pairs = [(kept, ours[f"model.{name}"] & there[name]) for name, kept in theirs.items()]
            same = sum(int((one == other).sum()) for one, other in pairs)
            found.setdefault(pattern, {})[str(size)] = same / sum(one.numel() for one, _ in pairs)
            print(pattern, size, found[pattern][str(size)], flush=True)
    return {
        "machine": machine(),
        "versions": versions(),
        "parameters": parameters,
        "samples": SAMPLES,
        "tokens": LENGTH,
        "agreement": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--model", type=Path, help="folder of a pretrained LLaMA, in place of a random one")
    parser.add_argument("--text", type=Path, help="file of text to calibrate it on")
    arguments = parser.parse_args()
    if arguments.model and not arguments.text:
        parser.error("--model needs --text")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.model:
        known["pretrained"] = pretrained(arguments.model, arguments.text)
        RESULTS.write_text(json.dumps(known, indent=2) + "\n")
        speed_page.write()
        return
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "metrics": {}}
    document |= {"pretrained": known["pretrained"]} if "pretrained" in known else {}
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
