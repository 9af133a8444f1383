"""What a GPU takes for a checkpoint of 7B shape, and the parts that were written for it.

    make bench-cuda

writes random bf16 weights of LLaMA-2-7B's shape (13.5 GB) to `--folder`, a temporary one by default, and prunes all 32
blocks with each metric on 128 samples of 2048 tokens, each run in a process of its own: seconds, peak memory on the
device and on the host, and how much of the reading went on beside the computation. Then SparseGPT's kernel against the
plain loop in torch, and whether Gram matrices of bf16 values may be summed up on tensor cores: how far the sums and
Wanda's and SparseGPT's masks are from those of float32 units. Writes `benchmarks/results/gpu.json` after every part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from streaming import BLOCKS, measure, write_checkpoint
from torch import Tensor

from pruneforge.interfaces.patterns import NM, Pattern, Unstructured
from pruneforge.numerics import exact_arithmetic
from pruneforge.runs.provenance import machine, versions
from pruneforge_sparsegpt import kernel
from pruneforge_sparsegpt.metric import PruneColumns, inverse_factor, prune_columns

RESULTS = Path(__file__).parent / "results" / "gpu.json"
METRICS = ("magnitude", "wanda", "sparsegpt", "gblm")
SAMPLES, TOKENS = 128, 2048
AIMS = {"wanda": 40, "sparsegpt": 120, "gblm": 180}
"""Seconds, on a GPU of the H100's class; each under 16 GB of device memory."""

DEVICE = torch.device("cuda", 0)


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the fastest of some repeats, when done for the second time and later."""
    work()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize(DEVICE)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(DEVICE)
        taken.append(time.perf_counter() - start)
    return min(taken)


def factor_of(columns: int, generator: torch.Generator) -> Tensor:
    """Return the factor of a random Hessian [columns, columns]."""
    inputs = torch.randn(4 * columns, columns, generator=generator, device=DEVICE)
    factor = inverse_factor(inputs.T @ inputs + 0.1 * torch.eye(columns, device=DEVICE))
    assert factor is not None
    return factor


def on_a_copy(prune: PruneColumns, weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune a copy of a block of columns, and return errors and mask."""
    return prune(weight.clone(), factor, pattern)


def column_loops() -> list[dict[str, Any]]:
    """Time one block of 128 columns by the kernel and by plain torch."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    found = []
    patterns: tuple[Pattern, ...] = (Unstructured(0.5), NM(2, 4))
    for rows in (4096, 11008):
        factor = factor_of(128, generator)
        weight = torch.randn(128, rows, generator=generator, device=DEVICE)
        for pattern in patterns:
            pruners = (kernel.prune_columns, prune_columns)
            fast, plain = (seconds(partial(on_a_copy, prune, weight, factor, pattern)) for prune in pruners)
            masks = [on_a_copy(prune, weight, factor, pattern)[1] for prune in pruners]
            found.append(
                {
                    "rows": rows,
                    "pattern": str(pattern),
                    "kernel_milliseconds": 1e3 * fast,
                    "plain_milliseconds": 1e3 * plain,
                    "masks_agree": (masks[0] == masks[1]).double().mean().item(),
                }
            )
            print(found[-1], flush=True)
    return found


def tensor_cores() -> list[dict[str, Any]]:
    """Compare a Gram matrix of bf16 and fp16 values from TF32 units with that of float32 units, and their masks."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator, device=DEVICE)
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.randn(64 * 1024, 4096, generator=generator, device=DEVICE).to(dtype)
        grams = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            gram = torch.zeros(4096, 4096, device=DEVICE)
            for part in values.split(4096):
                gram.addmm_(part.T.float(), part.float())
            grams.append(gram)
        torch.set_float32_matmul_precision("highest")
        exact = torch.zeros(4096, 4096, dtype=torch.float64, device=DEVICE)
        for part in values.split(4096):
            exact.addmm_(part.T.double(), part.double())
        row: dict[str, Any] = {"dtype": str(dtype)}
        for name, gram in zip(("float32", "tf32"), grams, strict=True):
            row[f"{name}_largest_error"] = ((gram - exact).abs().max() / exact.diagonal().mean()).item()
        masks = [Unstructured(0.5).select(weight.abs() * gram.diagonal().sqrt()) for gram in grams]
        row["wanda_masks_agree"] = (masks[0] == masks[1]).double().mean().item()
        damped = [gram + 0.01 * gram.diagonal().mean() * torch.eye(4096, device=DEVICE) for gram in grams]
        factors = [inverse_factor(gram) for gram in damped]
        solved = [
            kernel.prune_columns(weight.T[:128].contiguous(), f[:128, :128], Unstructured(0.5))[1]
            for f in factors
            if f is not None
        ]
        row["sparsegpt_masks_agree"] = (solved[0] == solved[1]).double().mean().item()
        found.append(row)
        print(row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="holds the checkpoint, or will; a temporary folder by default")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "aims_seconds": AIMS, "runs": []}

    def keep(**more: Any) -> None:
        document.update(more)
        RESULTS.write_text(json.dumps(document, indent=2) + "\n")

    with exact_arithmetic(0, DEVICE):
        keep(column_loops=column_loops())
    keep(tensor_cores=tensor_cores())
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        write_checkpoint(folder)
        for metric in arguments.metrics:
            # The second, of fewer blocks, waits for the device after each stage, so that the trace says what ran when.
            for blocks, profile in ((arguments.blocks, False), (min(arguments.blocks, 4), True)):
                run = measure(folder, metric, blocks, SAMPLES, TOKENS, "cuda", profile)
                print(run, flush=True)
                document["runs"].append(run)
                keep()


if __name__ == "__main__":
    main()
