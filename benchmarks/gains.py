"""What the zeros of a pruned model gain without special hardware: bytes if it is compressed, time if they are skipped.

    python benchmarks/gains.py

The demo's language model is pruned and its weight file compressed as it is; a layer of the shape that LLaMA-7B has, of
random weights, is multiplied densely and in torch's compressed rows. Writes `benchmarks/results/gains.json` and
`docs/results/gains.md`.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from outcome import made_on, with_machine, write

import pruneforge
from pruneforge.plugins import loaded_plugins

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "gains.json", ROOT / "docs" / "results" / "gains.md"
PATTERNS = (0.5, "2:4", 0.7, 0.9)
SPARSITIES = (0.5, 0.7, 0.9, 0.95, 0.99)
WIDTH, TOKENS = 4096, (1, 16, 128)
ROUNDS = 9
HEAD = """# What the zeros gain

Made by `python benchmarks/gains.py`. A pruned model is dense with zeros. Without anything that knows of them it is as
large and as fast as before; this page shows what they gain on disk when the file is compressed, and on a CPU when a
product skips them. The 2:4 kernels of recent NVIDIA GPUs are not measured here.
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    document = with_machine({"files": files(), "products": products()})
    write(document, RESULTS, page(document), PAGE)


def files() -> list[dict[str, Any]]:
    """Return the bytes of the weight file of the dense and of each pruned model, as it is and compressed."""
    model = loaded_plugins().registry.create("demo", "text").checkpoint()
    rows = [{"pattern": "dense", **_sizes(model / "model.safetensors")}]
    with tempfile.TemporaryDirectory(prefix="pruneforge-gains-") as folder:
        for pattern in PATTERNS:
            output = Path(folder) / str(pattern).replace(":", "of")
            asked = {"sparsity": pattern} if isinstance(pattern, float) else {"pattern": pattern}
            pruneforge.prune(model, "magnitude", **asked, output=output)
            found = pruneforge.inspect(output)["bytes"]
            kept = found["packed"] - found["dense"]  # of the pruned layers; the others are as before
            sizes = _sizes(output / "model.safetensors")
            name = f"{pattern:.0%}" if isinstance(pattern, float) else pattern
            rows.append({"pattern": name, **sizes, "packed": sizes["file"] + kept})
    return rows


def _sizes(file: Path) -> dict[str, int]:
    content = file.read_bytes()
    return {"file": len(content), "zlib": len(zlib.compress(content, 6)), "xz": len(lzma.compress(content))}


def products() -> list[dict[str, Any]]:
    """Return the seconds of a layer's product, dense and in compressed rows, for several numbers of tokens."""
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH)
    rows = []
    for sparsity in SPARSITIES:
        least = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
        pruned = torch.where(weight.abs() > least, weight, 0.0)
        compressed = pruned.to_sparse_csr()
        for tokens in TOKENS:
            inputs = torch.randn(WIDTH, tokens)
            assert torch.allclose(compressed @ inputs, pruned @ inputs, atol=1e-3)
            dense, zeros, sparse = _seconds(
                lambda inputs=inputs: weight @ inputs,
                lambda inputs=inputs, pruned=pruned: pruned @ inputs,
                lambda inputs=inputs, compressed=compressed: compressed @ inputs,
            )
            rows.append({"sparsity": sparsity, "tokens": tokens, "dense": dense, "zeros": zeros, "compressed": sparse})
    return rows


def _seconds(*works: Callable[[], object]) -> list[float]:
    """Return the median seconds of each, which take turns."""
    taken: list[list[float]] = [[] for _ in works]
    for number in range(ROUNDS + 1):
        for own, work in zip(taken, works, strict=True):
            start = time.perf_counter()
            work()
            if number:  # the first warms up
                own.append(time.perf_counter() - start)
    return [median(own) for own in taken]


def page(document: dict[str, Any]) -> str:
    """Return the page."""
    dense = document["files"][0]
    lines = [HEAD, "## On disk", ""]
    lines += [
        "The demo's language model (bfloat16), pruned by magnitude; MB of its weight file, and the share of the dense",
        "one. *Kept values* are those of the pruned layers with one bit a weight, as `pruneforge inspect` counts them.",
        "",
        "| pattern | file | zlib | xz | kept values and bits |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in document["files"]:
        cells = [_megabytes(row[name], dense["file"]) for name in ("file", "zlib", "xz")]
        packed = _megabytes(row["packed"], dense["file"]) if "packed" in row else "–"
        lines.append(f"| {row['pattern']} | {' | '.join(cells)} | {packed} |")
    lines += ["", "## Products on a CPU", ""]
    lines += [
        f"A weight of {WIDTH:,} x {WIDTH:,} in float32 times some tokens, on {document['machine']['threads']} threads:",
        f"milliseconds, medians of {ROUNDS} turns. *Zeros* is the dense product of the pruned weight; *compressed* is",
        "torch's CSR, which skips them.",
        "",
        "| sparsity | tokens | dense | zeros | compressed | gain |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["products"]:
        times = [f"{1e3 * row[name]:.2f}" for name in ("dense", "zeros", "compressed")]
        gain = row["dense"] / row["compressed"]
        lines.append(f"| {row['sparsity']:.0%} | {row['tokens']} | {' | '.join(times)} | {gain:.2f}x |")
    lines += ["", made_on(document, "python", "torch"), ""]
    return "\n".join(lines)


def _megabytes(count: int, whole: int) -> str:
    return f"{count / 1e6:.2f} ({count / whole:.0%})"


if __name__ == "__main__":
    main()
