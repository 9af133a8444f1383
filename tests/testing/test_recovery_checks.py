"""Recoveries keep their promises, and each check catches one that breaks its promise."""

from __future__ import annotations

import itertools

import pytest
import torch

from pruneforge import Recovery, create
from pruneforge.plugins import loaded_plugins
from pruneforge.testing import check_recovery, parametrize_with_checks, run_checks

QUICK = {"perp": {"steps": 6, "lr": 3e-3, "vector_lr": 1e-2, "rank": 4, "save_every": 2}}
FIRST_PARTY = [
    create("recovery", entry.name, **QUICK.get(entry.name, {}))
    for entry in loaded_plugins().registry.entries("recovery")
]


@parametrize_with_checks([*FIRST_PARTY, create("recovery", "reconstruct", targets="pruned", epochs=2)])
def test_first_party_recoveries_keep_their_promises(check):
    assert check.run() is None  # it raises otherwise


def ridge(site):
    type(create("recovery", "ridge")).recover_block(create("recovery", "ridge"), site)


class Solving(Recovery):
    requires = create("recovery", "ridge").requires

    def recover_block(self, site):
        ridge(site)
        self.worsen(site)

    def worsen(self, site):
        raise NotImplementedError


class Scaling(Solving):
    def worsen(self, site):
        for layer in site.layers:
            if not site.masks[layer.name].all():
                layer.write(site.masks[layer.name], 2 * layer.weight)


class Restless(Solving):
    def worsen(self, site):
        for layer in site.layers:
            if site.masks[layer.name].all():
                layer.write(site.masks[layer.name], 1.01 * layer.weight)


class Reaching(Solving):
    def worsen(self, site):
        for parameter in site._chain.module.parameters():
            parameter.data *= 1 if any(parameter is own for own in site.parameters()) else 1.0001


class Counting(Solving):
    calls = itertools.count()

    def worsen(self, site):
        layer = site.layers[0]
        layer.write(site.masks[layer.name], layer.weight * (1 + 1e-6 * next(self.calls) % 7))


class Wide(Solving):
    def worsen(self, site):
        assert next(site.block.module.parameters()).dtype == torch.float64, "it wants float64"


class Ascending(Recovery):
    def recover_model(self, site):
        norms = [name for name, parameter in site.parameters().items() if parameter.dim() == 1]
        site.write({name: 5 * site.parameters()[name] for name in norms})


class Forgetful(Recovery):
    """Saves how far it came, and not what it trained."""

    def recover_model(self, site):
        vectors = {name: p.clone() for name, p in site.parameters().items() if p.dim() == 1}
        vectors = {name: vector.float().requires_grad_() for name, vector in vectors.items()}
        optimizer = torch.optim.Adam(vectors.values(), lr=1e-3)
        done = (site.restored() or {"steps": 0})["steps"]
        for step, batch in zip(range(done, 6), site.batches(done), strict=False):
            site.backward(site.losses(batch, vectors).mean())
            site.step(optimizer)
            site.checkpoint({"steps": step + 1})
        site.write(vectors)


BROKEN = {
    Ascending: {"the loss on the calibration data falls"},
    Forgetful: {"one that was stopped goes on to the same weights"},
    Scaling: {"models come nearer to the dense one"},
    Restless: {"a dense model stays as it is"},
    Reaching: {"stem and head and excluded layers stay"},
    Counting: {"the same seed gives the same weights"},
    Wide: {"narrow dtypes work"},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_recovery_is_caught_by_the_check_of_what_it_breaks(broken):
    assert {check.name for check, said in run_checks([broken()]) if said is not None} == BROKEN[broken]


class Moving(Recovery):
    def recover_block(self, site):
        for layer in site.layers:
            layer.parameter.data += 1


def test_what_the_engine_refuses_fails_the_check():
    with pytest.raises(AssertionError, match="pruned weights stay zero: recovery 'moving' moved pruned weights"):
        check_recovery(Moving())
