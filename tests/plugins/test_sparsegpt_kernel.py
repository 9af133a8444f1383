"""SparseGPT's Triton kernel against a loop over rows and columns; on the CPU by Triton's own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pruneforge.patterns import parse_pattern
from pruneforge_sparsegpt.metric import inverse_factor, prune_columns

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")

PATTERNS = ["0.5", "0", "0.9", "2:4", "4:8", "1:4"]
COLUMNS = [128, 96, 24]
ROWS = 45  # no multiple of the kernel's tile

RUN = """
import sys, torch
from pruneforge_sparsegpt import kernel
from pruneforge.patterns import parse_pattern
cases = torch.load(sys.argv[1])
for case in cases:
    text = case["pattern"]
    pattern = parse_pattern(None, text, "layer") if ":" in text else parse_pattern(float(text), None, "layer")
    weight = case["weight"].clone().to(sys.argv[3])
    errors, mask = kernel.prune_columns(weight, case["factor"].to(sys.argv[3]), pattern)
    case["kernel"] = (weight.cpu(), errors.cpu(), mask.cpu())
torch.save(cases, sys.argv[2])
"""


def slowly(weight, factor, pattern):
    """One row after the other, one column after the other; errors, mask and weight as [columns, rows]."""
    columns, rows = weight.shape
    left, mask, errors = weight.clone(), torch.ones_like(weight, dtype=torch.bool), torch.zeros_like(weight)
    diagonal = factor.diagonal()
    if ":" not in pattern:
        scores = (weight / diagonal[:, None]).square().T.flatten()  # row by row, the order in which ties are pruned
        count = int(float(pattern) * columns * rows)
        smallest = torch.sort(scores, stable=True).indices[:count]
        mask.T.reshape(-1)[smallest] = False
        flat = torch.ones(rows * columns, dtype=torch.bool)
        flat[smallest] = False
        mask = flat.view(rows, columns).T.contiguous()
    for row in range(rows):
        for j in range(columns):
            if ":" in pattern and j % int(pattern.split(":")[1]) == 0:
                n, m = (int(part) for part in pattern.split(":"))
                scores = (left[j : j + m, row] / diagonal[j : j + m]) ** 2
                mask[j + torch.sort(scores, stable=True).indices[: m - n], row] = False
            if not mask[j, row]:
                errors[j, row] = left[j, row] / diagonal[j]
                left[j + 1 :, row] -= factor[j, j + 1 :] * errors[j, row]
                left[j, row] = 0
    return left, errors, mask


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    made = []
    for columns in COLUMNS:
        wide = columns + 40
        inputs = torch.randn(3 * wide, wide, generator=generator, dtype=torch.float64)
        whole = inverse_factor(inputs.T @ inputs + 0.1 * torch.eye(wide, dtype=torch.float64))
        factor = whole[20:-20, 20:-20]  # as the metric has it, in memory too: a part of a larger matrix
        for pattern in PATTERNS:
            weight = torch.randn(columns, ROWS, generator=generator, dtype=torch.float64)
            weight[:8, 3] = 0.5  # ties
            made.append({"pattern": pattern, "weight": weight, "factor": factor})
    folder = tmp_path_factory.mktemp("kernel")
    # Pickling keeps strides: the kernel is given the memory that the metric gives it.
    torch.save(made, folder / "in.pt")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In a process of its own: Triton decides when it is imported whether it interprets.
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})}
    command = [sys.executable, "-c", RUN, str(folder / "in.pt"), str(folder / "out.pt"), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_kernel_prunes_as_the_slow_loop_does(pattern, cases):
    chosen = [case for case in cases if case["pattern"] == pattern]
    assert len(chosen) == len(COLUMNS)
    for case in chosen:
        weight, errors, mask = slowly(case["weight"], case["factor"], pattern)
        found_weight, found_errors, found_mask = case["kernel"]
        assert torch.equal(found_mask, mask)
        torch.testing.assert_close(found_weight, weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_errors, errors, rtol=1e-9, atol=1e-9)
        assert (found_weight[~mask] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_torch_prunes_as_the_slow_loop_does(pattern, cases):

    asked = parse_pattern(None, pattern, "layer") if ":" in pattern else parse_pattern(float(pattern), None, "layer")
    for case in (case for case in cases if case["pattern"] == pattern):
        weight, errors, mask = slowly(case["weight"], case["factor"], pattern)
        found = case["weight"].clone()
        found_errors, found_mask = prune_columns(found, case["factor"], asked)
        assert torch.equal(found_mask, mask)
        torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_errors, errors, rtol=1e-9, atol=1e-9)
