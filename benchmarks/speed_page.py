"""The page that shows the results of `benchmarks/speed.py` and `benchmarks/costs.py`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from workload import SAMPLES, SHAPE, TOKENS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
WORK = """A random LLaMA of 29.5 M parameters (hidden 512, 8 blocks) in float32, 64 samples of 512 tokens, 50 %.
Seconds from the model's folder to pruned weights, the libraries imported before; PruneForge's time includes writing
them. `plain` is [the loop of the research repositories](../benchmarks/plain_loop.py): one sample at a time, a statistic
for each layer, full sorts, autograd over the whole model. Agreement is the share of weights on which a mask is the same
as PruneForge's. Memory is the peak above what the imported libraries take, which differs between builds of torch. The
floor is the bare matrix products of the two forward passes (weights and attention), for SparseGPT with its Gram
products, timed before and after."""
AXES = {
    "samples": "samples",
    "tokens": "tokens a sample",
    "hidden_size": "width (line over its square)",
    "num_hidden_layers": "blocks",
    "patterns": "sparsities at once (dense propagation)",
}


def write() -> None:
    """Write `docs/speed.md` from what results there are."""
    lines = [
        "# Speed",
        "",
        "Made by `make bench`. Runs took turns, each in a process of its own; medians where there are several rounds.",
        "",
    ]
    for name, part in (("speed", _peers), ("costs", _costs)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += part(json.loads(path.read_text()))
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def _peers(document: dict[str, Any]) -> list[str]:
    lines = [
        "## Beside others",
        "",
        *textwrap.wrap(WORK, 118),
        "",
        "| metric | contender | seconds | times PruneForge's | agreement | memory, MB | peak, MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for metric, found in document["metrics"].items():
        ours = found["pruneforge"]["seconds"]
        for who, run in found.items():
            if who == "floor":
                continue
            agreed = f"{run['agreement']:.3%}" if "agreement" in run else ""
            above = (run["peak_bytes"] - run["imported_bytes"]) / 1e6
            lines.append(
                f"| `{metric}` | {who} | {run['seconds']:.1f} | {run['seconds'] / ours:.2f} | {agreed} | {above:.0f} | "
                f"{run['peak_bytes'] / 1e6:.0f} |"
            )
    lines += [
        "",
        "| metric | floor, seconds | PruneForge over it | llm-compressor over it | plain loop over it |",
        "|---|---:|---:|---:|---:|",
    ]
    for metric, found in document["metrics"].items():
        if metric == "magnitude":
            continue
        floor = found["floor"]["weights"] + found["floor"]["attention"]
        floor += found["floor"]["gram"] if metric == "sparsegpt" else 0
        over = [
            f"{found[who]['seconds'] / floor:.2f}" if who in found else ""
            for who in ("pruneforge", "llm-compressor", "plain")
        ]
        lines.append(f"| `{metric}` | {floor:.1f} | {' | '.join(over)} |")
    rounds = document["rounds"]
    lines += ["", f"{rounds} round{'s' if rounds > 1 else ''}. {_machine(document)}"]
    if document["peers"]:
        lines.append(f"Peers: {', '.join(f'{name} {version}' for name, version in document['peers'].items())}.")
    return [*lines, ""]


def _costs(document: dict[str, Any]) -> list[str]:
    base, passes, compiled = document["base"], document["vit"], document["compiling"]
    lines = [
        "## How it grows",
        "",
        f"{base['samples']} samples of {base['tokens']} tokens, {base['num_hidden_layers']} blocks of width "
        f"{base['hidden_size']}; one of these changes at a time. The last column is how far a straight line misses.",
        "",
        "| metric | against | seconds | largest residual |",
        "|---|---|---|---:|",
    ]
    for name, curve in document["curves"].items():
        metric, axis = name.split(" ")
        points = ", ".join(f"{size}: {seconds:.2f}" for size, seconds in curve["seconds"].items())
        lines.append(f"| `{metric}` | {AXES[axis]} | {points} | {curve['largest_residual_share']:.1%} |")
    two, wanda = passes["two forward passes"], passes["wanda"]
    eager, quick = compiled["eager batch"], compiled["compiled batch"]
    work = 2 * SAMPLES * TOKENS // 1024 * SHAPE["num_hidden_layers"]
    verdict = f"after {compiled['compile'] / (eager - quick):,.0f} passes of a block" if quick < eager else "never"
    return [
        *lines,
        "",
        "## A vision transformer",
        "",
        f"DeiT-small (random), 512 images of 224 x 224: Wanda {wanda:.1f} s, two bare timm forward passes of the same",
        f"batches {two:.1f} s: {wanda / two:.2f} times.",
        "",
        "## Compiling",
        "",
        f"`torch.compile` of a block takes {compiled['compile']:.1f} s; a batch then takes {quick * 1e3:.1f} ms",
        f"instead of {eager * 1e3:.1f} ms. It pays {verdict}; a calibrated run of the work above has {work:,}.",
        "PruneForge does not compile.",
        "",
        _machine(document),
        "",
    ]


def _machine(document: dict[str, Any]) -> str:
    system, packages = document["machine"], document["versions"]
    return (
        f"Machine: {system['processor']}, {system['cores']} cores, {system['threads']} threads, "
        f"{', '.join(system['accelerators']) or 'no accelerator'}; torch {packages['torch']}, "
        f"transformers {packages['transformers']}, timm {packages['timm']}."
    )
