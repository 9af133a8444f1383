"""The arithmetic of a run leaves everybody else's settings as they were, whichever of torch's interfaces set them."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tokens

import pruneforge
from pruneforge.numerics import exact_arithmetic, products_of, repeatable_gradients, seed_random_numbers

BACKENDS = torch.backends
CPU = torch.device("cpu")
new_interface = pytest.mark.skipif(not hasattr(BACKENDS, "fp32_precision"), reason="torch before 2.9")


def leaves():
    return [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv]


def precisions():
    return [leaf.fp32_precision for leaf in leaves()]


@pytest.fixture
def settings():
    """Whatever a test sets is taken back."""
    parents = [BACKENDS, BACKENDS.cudnn, BACKENDS.mkldnn]
    before = [(place, place.fp32_precision) for place in (*parents, *leaves())]
    yield
    for place, precision in before:
        place.fp32_precision = precision
    torch.set_float32_matmul_precision("highest")


def by_the_newer_interface(place, value):
    def set_it():
        place().fp32_precision = value

    return set_it


SETTINGS = {
    "nothing": lambda: None,
    "all tf32": by_the_newer_interface(lambda: BACKENDS, "tf32"),
    "all ieee": by_the_newer_interface(lambda: BACKENDS, "ieee"),
    "cuda.matmul": by_the_newer_interface(lambda: BACKENDS.cuda.matmul, "tf32"),
    "cudnn": by_the_newer_interface(lambda: BACKENDS.cudnn, "tf32"),
    "older, high": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older, cudnn": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
}


@new_interface
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_is_exact_and_leaves_the_precision_as_it_was(setting, settings):
    expected = pruneforge.prune(tiny_llama(torch.float32), "sparsegpt", 0.5, calibration=[tokens()]).masks
    SETTINGS[setting]()
    before = precisions()
    with exact_arithmetic(0, CPU):
        assert precisions() == ["ieee"] * 5
        with products_of(torch.bfloat16, CPU):
            assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    assert precisions() == before
    found = pruneforge.prune(tiny_llama(torch.float32), "sparsegpt", 0.5, calibration=[tokens()]).masks
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@new_interface
def test_what_was_inherited_is_inherited_afterwards(settings):
    BACKENDS.fp32_precision = "tf32"
    with exact_arithmetic(0, CPU):
        pass
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.mkldnn.matmul.fp32_precision == "ieee"


def test_algorithms_of_convolutions_are_repeatable_within_a_run_alone():
    BACKENDS.cudnn.benchmark = True
    try:
        with exact_arithmetic(0, CPU):
            assert BACKENDS.cudnn.deterministic
            assert not BACKENDS.cudnn.benchmark
        assert BACKENDS.cudnn.benchmark
        assert not BACKENDS.cudnn.deterministic
    finally:
        BACKENDS.cudnn.benchmark = False


def test_gradients_use_attention_without_atomics_on_cuda_alone():
    with repeatable_gradients(torch.device("cuda", 0)):
        assert BACKENDS.cuda.math_sdp_enabled()
        assert not BACKENDS.cuda.flash_sdp_enabled()
        assert not BACKENDS.cuda.mem_efficient_sdp_enabled()
    with repeatable_gradients(CPU):
        assert BACKENDS.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("metric", ["wanda", "gblm"])
def test_attention_that_gives_nan_at_padding_on_the_left_is_told_what_to_do(metric):
    ids, pad = tokens(), torch.full((6, 5), 7)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad * 0, ids * 0 + 1], 1)}
    eager = tiny_llama(attn_implementation="eager")  # its softmax is float32, where float64's smallest number is -inf
    with pytest.raises(pruneforge.PruneForgeError, match="pad on the right, load the model with attn_implementation"):
        pruneforge.prune(copy.deepcopy(eager), metric, 0.5, calibration=[padded])
    model = tiny_llama(attn_implementation="sdpa")
    expected = pruneforge.prune(copy.deepcopy(model), metric, 0.5, calibration=[ids]).masks
    for dtype, implementation in ((torch.float64, "sdpa"), (torch.float32, "eager")):
        found = tiny_llama(dtype, attn_implementation=implementation)
        masks = pruneforge.prune(found, metric, 0.5, calibration=[padded]).masks
        agreeing = sum(int((masks[name] == mask).sum()) for name, mask in expected.items())
        assert agreeing >= 0.999 * sum(mask.numel() for mask in expected.values())


def test_seeding_covers_the_random_numbers_of_torch_python_and_numpy():
    def draw(seed):
        seed_random_numbers(seed, CPU)
        return torch.rand(()).item(), random.random(), np.random.rand()

    with exact_arithmetic(0, CPU):  # it restores the generators
        one, same, other, negative = draw(1), draw(1), draw(2), draw(-5)
    assert one == same
    assert len({*one, *other, *negative}) == 9
