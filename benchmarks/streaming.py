"""Peak memory and time of streamed runs on a checkpoint of LLaMA-2-7B's shape, by metric and depth.

    python benchmarks/streaming.py --folder DIR

writes random bf16 weights (13.5 GB, shard by shard) to DIR, unless they are there, and prunes models of 4, 8, 16
and 32 of their blocks with each metric, every run in a process of its own. Then a few blocks are pruned with more
samples and longer ones. Peaks are what the kernel says of the process (`ru_maxrss`), imports included. Writes
`benchmarks/results/streaming.json` after every run, goes on where it was stopped, and writes
`docs/results/streaming.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruneforge.memory import usual_tokens_a_batch
from pruneforge.profile import PROFILE_FILE
from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "streaming.json"
SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
BLOCKS = 32
DEPTHS = (4, 8, 16, 32)
SAMPLES, TOKENS = 8, 128


def write_checkpoint(folder: Path) -> None:
    """Write a shard for each block, and one for stem and head; whole shards that are there are kept."""
    from transformers import LlamaConfig

    from pruneforge.checkpoint.durable import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "outside.safetensors": {
            "model.embed_tokens.weight": (SHAPE["vocab_size"], hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (SHAPE["vocab_size"], hidden),
        }
    }
    for index in range(BLOCKS):
        parts = {**attention, **mlp, **norms}
        names = {f"model.layers.{index}.{name}.weight": shape for name, shape in parts.items()}
        shapes[f"block-{index:02d}.safetensors"] = names
    generator = torch.Generator().manual_seed(0)
    for file, tensors in shapes.items():
        if not (folder / file).exists():
            write_tensors(folder / file, {n: _random(s, generator) for n, s in tensors.items()}, {"format": "pt"})
    LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS).save_pretrained(folder)
    index_of = {name: file for file, tensors in shapes.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index_of}))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def with_depth(folder: Path, depth: int, to: Path) -> Path:
    """Make a model of the first `depth` blocks, of links to the shards."""
    to.mkdir(parents=True)
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {n: file for n, file in listed.items() if file == "outside.safetensors" or int(file[6:8]) < depth}
    for file in set(kept.values()):
        (to / file).symlink_to((folder / file).resolve())
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "num_hidden_layers": depth}))
    return to


def child(arguments: argparse.Namespace) -> None:
    """Prune once and print the report's measurements."""
    import pruneforge

    torch.manual_seed(0)
    ids = torch.randint(SHAPE["vocab_size"], (arguments.samples, arguments.tokens))
    batch = max(1, usual_tokens_a_batch(torch.device(arguments.device)) // arguments.tokens)  # as a run takes by itself
    report = pruneforge.prune(
        arguments.model,
        arguments.metric,
        0.5,
        None,
        None if arguments.metric == "magnitude" else ids.split(batch),
        output=arguments.output,
        gradient_cache=arguments.output.parent / "gradients",
        device=arguments.device,
        profile=arguments.profile,
    ).report
    trace = arguments.output / PROFILE_FILE
    hidden = reading_beside(json.loads(trace.read_text())["traceEvents"]) if trace.exists() else None
    found = {"measured": report["measured"], "reached": report["sparsity"]["reached"], "reading_beside": hidden}
    print(json.dumps(found))


def reading_beside(events: list[dict[str, Any]]) -> float:
    """Return the share of the time that reading takes in which the device works on another block."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.get("cat") in ("read", "calibrate", "propagate", "prune"):
            spans[event["cat"] == "read"].append((event["ts"], event["ts"] + event["dur"]))
    both = sum(max(0.0, min(r[1], w[1]) - max(r[0], w[0])) for r in spans[True] for w in spans[False])
    return both / sum(stop - start for start, stop in spans[True])


def measure(
    folder: Path, metric: str, depth: int, samples: int, tokens: int, device: str, profile: bool = False
) -> dict[str, Any]:
    """Prune in a process of its own, and return what it took."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model = with_depth(folder, depth, Path(scratch) / "model")
        command = [sys.executable, __file__, "--child", "--folder", str(folder), "--model", str(model)]
        command += ["--metric", metric, "--samples", str(samples), "--tokens", str(tokens), "--device", device]
        command += ["--output", str(Path(scratch) / "output"), *(["--profile"] if profile else [])]
        with open(Path(scratch) / "printed", "w+") as printed:
            process = subprocess.Popen(command, stdout=printed)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{metric} with {depth} blocks failed")
            printed.seek(0)
            found = json.loads(printed.read().splitlines()[-1])
    seconds = found["measured"]["seconds"]
    return {
        "metric": metric,
        "blocks": depth,
        "samples": samples,
        "tokens": tokens,
        "device": device,
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "device_peak_gb": round(found["measured"]["peak_memory"].get("device_reserved_bytes", 0) / 1e9, 3),
        "seconds": seconds,
        "reached": found["reached"],
        **({"reading_beside": found["reading_beside"]} if found["reading_beside"] is not None else {}),
    }


def linear_fit(x: list[float], y: list[float]) -> dict[str, float]:
    """Return intercept, slope, and the largest residual as a share of the largest value."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = max(abs(intercept + slope * a - b) for a, b in zip(x, y, strict=True))
    return {"intercept": float(intercept), "slope": float(slope), "largest_residual_share": float(residual / max(y))}


def fits(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how time grows with depth, samples and tokens."""
    found: dict[str, Any] = {}
    for metric in dict.fromkeys(run["metric"] for run in runs):
        mine = [run for run in runs if run["metric"] == metric]
        for axis in ("blocks", "samples", "tokens"):
            others = {"blocks": 2, "samples": SAMPLES, "tokens": TOKENS}
            del others[axis]
            rows = [run for run in mine if all(run[key] == value for key, value in others.items())]
            if len({run[axis] for run in rows}) > 2:
                fit = linear_fit([run[axis] for run in rows], [run["seconds"]["total"] for run in rows])
                found[f"{metric}, seconds by {axis}"] = fit
    return found


def jobs(metrics: list[str], depths: list[int], sparsegpt_blocks: int) -> list[tuple[str, int, int, int]]:
    """Return what to measure: metric, blocks, samples, tokens."""
    found = [(metric, depth, SAMPLES, TOKENS) for depth in depths for metric in metrics if metric != "sparsegpt"]
    if "sparsegpt" in metrics:
        found.append(("sparsegpt", sparsegpt_blocks, SAMPLES, TOKENS))
    if "wanda" in metrics:
        found += [("wanda", 2, samples, TOKENS) for samples in (8, 16, 32, 64)]
        found += [("wanda", 2, SAMPLES, tokens) for tokens in (256, 512, 1024)]
    return found


def page(document: dict[str, Any]) -> str:
    """Return the results as a page of the documentation."""
    usual = [run for run in document["runs"] if (run["samples"], run["tokens"]) == (SAMPLES, TOKENS)]
    lines = [
        "# Streaming a checkpoint of 7B shape",
        "",
        "Made by `python benchmarks/streaming.py --folder DIR`; the numbers are in",
        "[`benchmarks/results/streaming.json`](../../benchmarks/results/streaming.json). Random bf16 weights of",
        f"LLaMA-2-7B's shape, {SAMPLES} samples of {TOKENS} tokens, 50 %. Peak is the process's own peak of resident",
        "memory, Python and its libraries included.",
        "",
        "| metric | blocks | peak, GB | seconds | of which gradients | calibrate and propagate | prune | write |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in sorted(usual, key=lambda run: (run["metric"], run["blocks"])):
        seconds = run["seconds"]
        passes = seconds.get("calibrate", 0) + seconds.get("propagate", 0)
        cells = [seconds["total"], seconds.get("gradients", 0), passes, seconds["prune"], seconds["write"]]
        times = " | ".join(f"{value:.1f}" for value in cells)
        lines.append(f"| `{run['metric']}` | {run['blocks']} | {run['peak_gb']:.2f} | {times} |")
    lines += ["", "Time against one size at a time, as a straight line:", ""]
    lines += ["| what | seconds for none | seconds for each more | largest residual |", "|---|---:|---:|---:|"]
    for what, fit in document["fits"].items():
        residual = f"{fit['largest_residual_share']:.1%}"
        lines.append(f"| {what} | {fit['intercept']:.1f} | {fit['slope']:.3g} | {residual} |")
    system, packages = document["machine"], document["versions"]
    lines += [
        "",
        f"Machine: {system['processor']}, {system['cores']} cores, {system['threads']} threads, "
        f"{', '.join(system['accelerators']) or 'no accelerator'}; torch {packages['torch']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="holds the checkpoint, or will; 55 GB are needed")
    parser.add_argument("--metrics", nargs="+", default=["magnitude", "wanda", "sparsegpt", "gblm"])
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--sparsegpt-blocks", type=int, default=1, help="blocks that SparseGPT prunes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for name in ("--model", "--output"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--metric", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    for name in ("--samples", "--tokens"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    write_checkpoint(arguments.folder)
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    done = {(run["metric"], run["blocks"], run["samples"], run["tokens"]) for run in runs}
    for job in jobs(arguments.metrics, arguments.depths, arguments.sparsegpt_blocks):
        if job in done:
            continue
        run = measure(arguments.folder, *job, arguments.device)
        runs.append(run)
        print(run, flush=True)
        document = {"shape": SHAPE, "runs": runs, "fits": fits(runs), "machine": machine(), "versions": versions()}
        RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    (ROOT / "docs" / "results" / "streaming.md").write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
