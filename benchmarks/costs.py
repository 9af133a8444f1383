"""What a run costs as it grows, what a ViT costs beside bare forward passes, and whether compiling pays.

    python benchmarks/costs.py

Every part is repeated in turns, and medians count. Writes `benchmarks/results/costs.json`; `make bench` puts it on the
page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import speed_page
import torch
from workload import SAMPLES, SHAPE, TOKENS, token_ids, write_model

import pruneforge
from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "costs.json"
BASE = {"samples": 32, "tokens": 256, "hidden_size": 512, "num_hidden_layers": 4, "patterns": 1}
WORK = {**BASE, "samples": SAMPLES, "tokens": TOKENS, "num_hidden_layers": SHAPE["num_hidden_layers"]}
"""What several patterns are asked for at once of: on less work, what they share would weigh less."""

CURVES: dict[str, tuple[int, ...]] = {
    "samples": (16, 32, 64, 128),
    "tokens": (64, 128, 256, 512),
    "hidden_size": (256, 512, 768, 1024),
    "num_hidden_layers": (2, 4, 8, 16),
    "patterns": (1, 2, 8),
}
SPARSITIES = (0.5, 0.2, 0.3, 0.4, 0.55, 0.6, 0.7, 0.8)
IMAGES, TOGETHER = 512, 4


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each work, all of them in turns."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in found.items()}


def run(metric: str, scratch: Path, propagate: str, size: dict[str, int]) -> Callable[[], dict[str, float]]:
    """Return a run of the given sizes, which returns its seconds by stage; its model is made now."""
    hidden, blocks = size["hidden_size"], size["num_hidden_layers"]
    model = scratch / f"model-{hidden}-{blocks}"
    if not model.exists():
        inner = SHAPE["intermediate_size"] * hidden // SHAPE["hidden_size"]
        write_model(model, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks)
    tokens = size["tokens"]
    batches = token_ids(size["samples"], tokens).split(max(1, 1024 // tokens))

    def work() -> dict[str, float]:
        output = scratch / "output"
        shutil.rmtree(output, ignore_errors=True)
        settings: dict[str, Any] = {"output": output, "propagate": propagate, "gradient_cache": scratch / "gradients"}
        if propagate == "dense":
            sparsities = SPARSITIES[: size["patterns"]]
            result = next(iter(pruneforge.prune_each(model, metric, sparsities, batches, **settings).values()))
        else:
            result = pruneforge.prune(model, metric, SPARSITIES[0], None, batches, **settings)
        return result.report["measured"]["seconds"]

    return work


def curves(metrics: Sequence[str], scratch: Path, rounds: int) -> dict[str, Any]:
    """Return seconds against each size, and a straight line through them."""
    found: dict[str, Any] = {}
    for metric in metrics:
        for axis, values in CURVES.items():
            propagate, base = ("dense", WORK) if axis == "patterns" else ("pruned", BASE)
            works = {str(value): run(metric, scratch, propagate, {**base, axis: value}) for value in values}
            medians = in_turns(works, rounds)
            # Width enters a product twice.
            x = np.array([value**2 if axis == "hidden_size" else value for value in values], dtype=float)
            y = np.array(list(medians.values()))
            slope, intercept = np.polyfit(x, y, 1)
            residual = float(np.abs(intercept + slope * x - y).max() / y.max())
            found[f"{metric} {axis}"] = {"seconds": medians, "largest_residual_share": residual}
            if axis == "patterns":
                ends = {str(value): works[str(value)]() for value in (values[0], values[-1])}
                found[f"{metric} {axis}"]["stages"] = ends
            print(metric, axis, found[f"{metric} {axis}"], flush=True)
    return found


def vit(rounds: int) -> dict[str, float]:
    """Return seconds of Wanda on a random DeiT-small, and of two bare forward passes over the same images."""
    import timm

    model = timm.create_model("deit_small_patch16_224", pretrained=False).eval()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(TOGETHER)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(2):
            for batch in images:
                model(batch)

    def prune() -> None:
        model.load_state_dict(dense)
        pruneforge.prune(model, "wanda", 0.5, None, images)

    return in_turns({"two forward passes": forwards, "wanda": prune}, rounds)


@torch.no_grad()
def compiling(scratch: Path, rounds: int) -> dict[str, float]:
    """Return seconds to compile a block, and of a batch through it compiled and not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_model(scratch / "to-compile", num_hidden_layers=1))
    block = model.model.layers[0]
    hidden = torch.randn(4, 256, BASE["hidden_size"])
    positions = model.model.rotary_emb(hidden, torch.arange(256)[None])
    compiled = torch.compile(block)
    first = seconds(lambda: compiled(hidden, position_embeddings=positions))
    works = {
        "eager batch": lambda: block(hidden, position_embeddings=positions),
        "compiled batch": lambda: compiled(hidden, position_embeddings=positions),
    }
    return {"compile": first, **in_turns(works, 10 * rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", nargs="+", default=["wanda", "sparsegpt"])
    arguments = parser.parse_args()
    document: dict[str, Any] = {"base": BASE, "rounds": arguments.rounds, "machine": machine(), "versions": versions()}
    parts: dict[str, Callable[[Path], Any]] = {
        "vit": lambda scratch: vit(arguments.rounds),
        "compiling": lambda scratch: compiling(scratch, arguments.rounds),
        "curves": lambda scratch: curves(arguments.metrics, scratch, arguments.rounds),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in parts.items():
            document[name] = part(Path(scratch))
            print(name, document[name], flush=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    speed_page.write()


if __name__ == "__main__":
    main()
