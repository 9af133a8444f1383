"""SparseGPT's Triton kernel against a loop over rows and columns; on the CPU by Triton's own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pruneforge.interfaces.patterns import NM, parse_pattern
from pruneforge_sparsegpt.metric import column_pruner, inverse_factor, prune_columns

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")

COMPILE = """
import re, subprocess, sys, tempfile
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = spec_from_file_location("kernel", sys.argv[1])
kernel = module_from_spec(spec)
spec.loader.exec_module(kernel)
folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GROUPS = [(0, 0), (2, 4), (1, 3), (8, 16)]  # the first for unstructured masks
widths = {}
for dtype, widest in kernel.WIDEST.items():
    name = "fp" + str(dtype)[-2:]
    widths[name] = [1 << power for power in range(widest.bit_length())]
# Everywhere the widest, which take most registers; on one GPU every width, and a group of odd size.
variants = [(c, d, g, w) for c, d, g in product((75, 80, 100, 120), widths, GROUPS[:2]) for w in widths[d][-2:]]
variants += [(90, d, g, w) for d, g in product(widths, GROUPS) for w in widths[d]]
for capability, dtype, (n, m), width in variants[int(sys.argv[2]) :: int(sys.argv[3])]:
    pointers = {"weight": "*" + dtype, "errors": "*" + dtype, "mask": "*i8", "factor": "*" + dtype}
    constants = {"n": n, "m": m, "width": width, "tile": kernel.TILE}
    signature = {**pointers, "rows": "i32", "columns": "i32", **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    source = ASTSource(
        kernel._prune_tile,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in range(4)},
    )
    options = {"num_warps": kernel.WARPS, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [folder / "cuobjdump", "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(what + r":(\\d+)", used)[1]) for what in ("REG", "STACK"))
    fused = "fma.rn" in made.asm["ptx"] or "div.full" in made.asm["ptx"]
    print(capability, dtype, n, m, width, registers, spilled, made.metadata.shared, int(fused))
"""
SPILLED = 16
"""Bytes a thread that may be spilled: a register or two around a division, outside the loops."""

PATTERNS = ["0.5", "0", "0.9", "2:4", "4:8", "1:4"]
COLUMNS = [128, 96, 24]
ROWS = 45  # no multiple of the kernel's tile

RUN = """
import sys, torch
from pruneforge_sparsegpt import kernel
from pruneforge.interfaces.patterns import parse_pattern
cases = torch.load(sys.argv[1])
for case in cases:
    text = case["pattern"]
    pattern = parse_pattern(None, text, "layer") if ":" in text else parse_pattern(float(text), None, "layer")
    weight = case["weight"].clone().to(sys.argv[3])
    errors, mask = kernel.prune_columns(weight, case["factor"].to(sys.argv[3]), pattern)
    again = case["weight"].clone().to(sys.argv[3])
    given = (again, *kernel.prune_columns(again, case["factor"].to(sys.argv[3]), mask))
    assert all(torch.equal(one, other) for one, other in zip(given, (weight, errors, mask), strict=True)), text
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
        under_mask = case["weight"].clone()
        found_errors, found_mask = prune_columns(under_mask, case["factor"], mask)
        assert torch.equal(found_mask, mask)
        torch.testing.assert_close(under_mask, weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_errors, errors, rtol=1e-9, atol=1e-9)


def compiled(kernel_file: Path, folder: Path, first: int, step: int) -> subprocess.CompletedProcess[str]:
    """Compile some variants of the kernel for GPUs that need not be there, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-c", COMPILE, str(kernel_file), str(first), str(step)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def kernel_file() -> Path:
    spec = find_spec("pruneforge_sparsegpt.kernel")
    assert spec is not None
    return Path(str(spec.origin))


# One variant in four, among them each GPU's and dtype's widest, and all.
@pytest.mark.parametrize(("first", "step"), [(1, 4), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_the_kernel_compiles_for_every_gpu_without_spilling_or_fusing(first, step, tmp_path):
    done = compiled(kernel_file(), tmp_path, first, step)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == (4 * 2 * 2 * 2 + 4 * (9 + 8)) // step
    assert {row[0] for row in rows} == {"75", "80", "90", "100", "120"}
    assert len({(row[0], row[1]) for row in rows}) == 10
    print("capability dtype n m columns registers spilled shared fused")  # pytest -rP shows them
    for row in rows:
        print(*row)
        spilled, shared, fused = (int(value) for value in row[6:])
        assert spilled <= SPILLED, row
        assert shared <= 48 * 1024, row  # what every GPU gives a program that does not ask for more
        assert not fused, row


def test_an_annotation_that_triton_refuses_is_seen(tmp_path):
    text = kernel_file().read_text()
    assert "    rows: tl.tensor,\n" in text
    planted = tmp_path / "kernel.py"
    planted.write_text(
        text.replace("    rows: tl.tensor,\n", "    rows: Any,\n").replace(
            "import torch\n", "import torch\nfrom typing import Any\n", 1
        )
    )
    done = compiled(planted, tmp_path / "cache", 0, 1000)
    assert done.returncode != 0
    assert "Any" in done.stderr


def test_without_a_gpu_that_triton_can_use_columns_are_pruned_in_plain_torch_and_the_reason_is_given():
    if torch.cuda.is_available():
        pytest.skip("Triton works here")
    prune, notes = column_pruner(torch.device("meta"), torch.float32, 128, NM(2, 4))
    assert prune is prune_columns
    assert len(notes) == 1
    assert notes[0].startswith("Triton cannot run here (")
    assert notes[0].endswith("so columns are pruned in plain torch, at a lower speed")
