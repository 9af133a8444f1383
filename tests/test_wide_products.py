"""Products of half precision are sums in float32, rounded once, whatever instructions the CPU has."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from training import QUICK

import pruneforge
from pruneforge import wide_products
from pruneforge.wide_products import DTYPES, WideProducts

WIDE = WideProducts(set(DTYPES))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def grouped(rows, weights):
    """Multiply groups of rows by a weight each; torch has no such product of float64."""
    ends = [10, 25, 60]
    if rows.dtype == torch.float64:
        return torch.cat([group @ weight for group, weight in zip(rows.tensor_split(ends[:-1]), weights, strict=True)])
    return torch._grouped_mm(rows, weights, offs=torch.tensor(ends, dtype=torch.int32))


PRODUCTS = {
    "linear": (functional.linear, [random(2, 40, 64), random(24, 64), random(24)]),
    "linear without bias": (functional.linear, [random(2, 40, 64), random(24, 64)]),
    "linear of few rows": (functional.linear, [random(3, 64), random(24, 64)]),
    "rows and columns": (torch.matmul, [random(40, 64), random(64, 24)]),
    "batches": (torch.bmm, [random(3, 20, 64), random(3, 64, 24)]),
    "batches and more": (torch.baddbmm, [random(3, 20, 24), random(3, 20, 64), random(3, 64, 24)]),
    "groups": (grouped, [random(60, 64), random(3, 64, 24)]),
    "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), [random(3, 20, 64), random(3, 24, 64)]),
    "convolution": (functional.conv2d, [random(2, 3, 16, 16), random(8, 3, 4, 4), random(8)]),
}


class Narrow(TorchDispatchMode):
    """Notes the products, and gradients of attention, that reach torch in half precision; to be entered first."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, factors = func.overloadpacket.__name__, [value for value in tree_leaves(args) if torch.is_tensor(value)]
        if re.search("mm|convolution|attention.*backward|^linear|^matmul|^einsum", name) and factors[0].dtype in DTYPES:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def assert_rounded_once(found, exact):
    """What float32 sums and one rounding give: half a step off, a little more where the sum of many is near zero."""
    info = torch.finfo(found.dtype)
    allowed = 0.51 * info.eps * exact.abs() + 1e-5 + info.smallest_normal
    assert found.dtype in DTYPES
    assert bool(((found.double() - exact).abs() <= allowed).all())


@dtypes
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_a_product_is_rounded_once(product, mode, dtype):
    multiply, factors = PRODUCTS[product]
    factors = [factor.to(dtype) for factor in factors]
    with mode():
        exact = multiply(*(factor.double() for factor in factors))
        with Narrow() as narrow, WIDE:
            found = multiply(*factors)
    assert_rounded_once(found, exact)
    few, whole = product == "linear of few rows", product == "einsum" and mode is torch.inference_mode
    assert bool(narrow.found) == (few or whole)  # einsum arrives whole in inference mode, and is left so


@dtypes
@pytest.mark.parametrize("product", [name for name in PRODUCTS if name != "linear of few rows"])
def test_gradients_of_a_product_are_rounded_once(product, dtype):
    multiply, factors = PRODUCTS[product]
    narrow = [factor.to(dtype).requires_grad_() for factor in factors]
    exact = [factor.detach().double().requires_grad_() for factor in narrow]
    direction = random(*multiply(*exact).shape).to(dtype)
    multiply(*exact).backward(direction.double())
    with Narrow() as reached, WIDE:
        multiply(*narrow).backward(direction)
    assert not reached.found
    for found, expected in zip(narrow[:2], exact, strict=False):  # a bias has no product: torch sums it in the dtype
        assert_rounded_once(found.grad, expected.grad)


@dtypes
def test_gradients_of_attention_are_those_of_float32(dtype):
    narrow = [random(2, 4, 30, 16).to(dtype).requires_grad_() for _ in "qkv"]
    wide = [factor.detach().float().requires_grad_() for factor in narrow]
    functional.scaled_dot_product_attention(*wide, is_causal=True).sum().backward()
    with Narrow() as reached, WIDE:
        functional.scaled_dot_product_attention(*narrow, is_causal=True).sum().backward()
    assert not reached.found
    for found, expected in zip(narrow, wide, strict=True):
        assert found.grad.dtype == dtype
        assert torch.allclose(
            found.grad.float(), expected.grad, rtol=0.02, atol=0.02 * float(expected.grad.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_other_dtypes_are_computed_as_ever(product, dtype):
    multiply, factors = PRODUCTS[product]
    factors = [factor.to(dtype) for factor in factors]
    with torch.inference_mode():
        expected = multiply(*factors)
        with WIDE:
            assert torch.equal(multiply(*factors), expected)


@pytest.mark.parametrize("multiply", [functional.linear, lambda a, b: torch.bmm(a[None], b[None].mT)])
def test_a_mixture_of_dtypes_is_refused_as_ever(multiply):
    with WIDE, pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        multiply(random(20, 8).bfloat16(), random(4, 8).float())


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_a_model_compiles_or_branches_by_still_runs():
    from torch.nn.attention.flex_attention import flex_attention

    values, others = random(1, 2, 128, 16).bfloat16(), random(16, 128).bfloat16()
    compiled = torch.compile(torch.matmul, fullgraph=True, backend="eager")
    with torch.no_grad(), WIDE:
        assert flex_attention(values, values, values).dtype == torch.bfloat16
        expected = values @ others
        assert torch.equal(torch.cond(torch.tensor(True), torch.matmul, torch.matmul, (values, others)), expected)
        assert torch.allclose(compiled(values, others), expected, rtol=0.01)


def test_other_devices_are_left_alone():
    with WIDE:
        found = random(20, 8).to("meta", torch.bfloat16) @ random(8, 4).to("meta", torch.bfloat16)
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.bfloat16, (20, 4))


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cuda"), (torch.float32, "cpu")])
def test_other_models_run_as_ever(dtype, device, monkeypatch):
    monkeypatch.setattr(wide_products, "is_fast", lambda dtype: False)
    model = torch.nn.Linear(4, 4, dtype=dtype)
    assert isinstance(wide_products.wide_products(model, torch.device(device)), nullcontext)


@pytest.mark.parametrize("slow", [True, False])
def test_a_model_runs_so_where_torchs_products_are_slow(slow, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(wide_products, "is_fast", lambda dtype: not slow)
    modes = set()
    watch = register_module_forward_hook(lambda *_: modes.add(type(_get_current_dispatch_mode())))
    expected = {WideProducts if slow else type(None)}
    try:
        result = pruneforge.prune(checkpoint, "gblm", 0.5, calibration="python-docs", samples=4, seqlen=16)
        assert modes == expected
        modes.clear()
        pruneforge.estimate(checkpoint, "wanda", sparsity=0.5, calibration="python-docs", samples=4, seqlen=16)
        assert modes == expected
        modes.clear()
        given = {"calibration": "python-docs", "samples": 4, "seqlen": 16}
        pruneforge.prune(checkpoint, "wanda", 0.5, **given, output=tmp_path / "pruned")
        pruneforge.recover(tmp_path / "pruned", "perp", recover_options=QUICK, **given, output=tmp_path / "recovered")
        assert modes == expected
        modes.clear()
        pruneforge.evaluate(result, "perplexity", data="python-docs", window=16, limit=2)
        assert modes == expected
    finally:
        watch.remove()
