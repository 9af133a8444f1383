"""Products of bfloat16 on this CPU: torch's own, and those of a run where these are slow, in float32 and rounded.

    python benchmarks/half_precision.py

Layers of several widths with 512 tokens, without and with their gradients. Writes
`benchmarks/results/half_precision.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from outcome import with_machine
from torch.nn import functional

from pruneforge.wide_products import DTYPES, WideProducts, is_fast

RESULTS = Path(__file__).parent / "results" / "half_precision.json"
WIDTHS, TOKENS = (576, 1024, 2048), 512
CONTEXTS = {"torch": nullcontext, "wide": lambda: WideProducts(set(DTYPES))}


def main() -> None:
    """Measure, and write the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {"fast": is_fast(torch.bfloat16), "layers": layers()}
    RESULTS.write_text(json.dumps(with_machine(found), indent=2) + "\n", encoding="utf-8")


def layers() -> list[dict[str, Any]]:
    """Return the seconds of a layer, forward and with its gradients, in bfloat16 both ways and in float32."""
    rows = []
    for width in WIDTHS:
        weight, inputs = (torch.randn(size, width, requires_grad=True) for size in (width, TOKENS))
        narrow = [value.detach().bfloat16().requires_grad_() for value in (inputs, weight)]
        row: dict[str, Any] = {"width": width, "float32": _both([inputs, weight])}
        for name, context in CONTEXTS.items():
            with context():
                row[name] = _both(narrow)
        rows.append(row)
    return rows


def _both(factors: list[torch.Tensor]) -> dict[str, float]:
    with torch.no_grad():
        forward = _seconds(lambda: functional.linear(*factors))
    return {"forward": forward, "with gradients": _seconds(lambda: functional.linear(*factors).sum().backward())}


def _seconds(work: Any) -> float:
    """Return the least seconds of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
