"""What every evaluator promises, checked on a tiny model that an adapter brings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pruneforge.interfaces.adapter import Adapter, Example, LoadedModel
from pruneforge.interfaces.evaluator import Evaluator, Subject
from pruneforge.plugins import loaded_plugins
from pruneforge.testing.kit import Kit, by_name, where_present
from pruneforge.testing.models import examples, first_that_works, fresh
from pruneforge.testing.source import seeded_globally

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """An evaluator, and the model that it is checked on.

    Attributes:
        evaluator: The evaluator.
        adapter: The model's adapter.
        example: The model; `None` if the evaluator takes none that was tried.
        reason: Why it takes none.
    """

    evaluator: Evaluator
    adapter: Adapter | None = None
    example: Example | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.evaluator.name

    def model(self) -> LoadedModel:
        """Return a copy of the model, float32, in evaluation mode."""
        assert self.adapter is not None
        assert self.example is not None
        module, _ = fresh(self.example, torch.float32)
        return LoadedModel(module.eval(), self.adapter, self.example.processor, type(module).__name__)

    def results(
        self, model: LoadedModel | None = None, batch_size: int | None = 2, items: bool = False
    ) -> dict[str, Any]:
        """Return what the evaluator says of a model, by default of a fresh copy."""
        cpu, registry = torch.device("cpu"), loaded_plugins().registry
        return self.evaluator.evaluate(Subject(model or self.model(), cpu, batch_size, 0, registry, items=items))

    def values(self, batch_size: int | None = 2) -> dict[str, Any]:
        """Return each single value of the results by its full name, without what differs between two evaluations."""
        results = self.results(batch_size=batch_size)
        return dict(_values({name: value for name, value in results.items() if name not in self.evaluator.measured}))


def cases(evaluator: Evaluator) -> Sequence[Case]:
    """Return the evaluator with the first example, of one of each adapter, that it takes."""

    def evaluated(candidate: tuple[Adapter, Example]) -> Case:
        case = Case(evaluator, *candidate)
        case.results()
        return case

    case, reason = first_that_works(examples(each=1), evaluated)
    return [case or Case(evaluator, reason=reason)]


def it_evaluates_a_model(case: Case) -> None:
    """Check that it takes one of the models."""
    assert case.example is not None, f"it takes none of the adapters' examples: {case.reason}"


def results_are_what_json_holds(case: Case) -> None:
    """Check that results are a dictionary that is the same as JSON, of finite numbers, and warnings texts."""
    results = case.results()
    assert isinstance(results, dict), f"the results are {type(results).__name__}, not a dictionary"
    assert results, "there are no results"
    assert json.loads(json.dumps(results, allow_nan=False)) == results, "the results change when written as JSON"
    for line in results.get("warnings", []):
        assert isinstance(line, str), f"a warning is {line!r}, not a text"


def the_same_twice(case: Case) -> None:
    """Check that two evaluations agree, but for what they measure, whatever the global random numbers are."""
    found = []
    for seed in (1, 2):
        with seeded_globally(seed):
            found.append(case.values())
    differing = [name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name)]
    assert not differing, f"{', '.join(sorted(differing))} differ between two evaluations; draw by `subject.seed`"


def the_batch_size_has_no_say(case: Case) -> None:
    """Check that numbers agree to a millionth, one sample at a time and several together."""
    one, several = (case.values(batch_size=size) for size in (1, 3))
    for name, value in one.items():
        other = several.get(name)
        if isinstance(value, float) and isinstance(other, float):
            same = math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        else:
            same = value == other
        assert same, f"{name} is {value!r} in batches of one and {other!r} in batches of three"


def items_are_one_record_each(case: Case) -> None:
    """Check what is recorded of each item, where anything is, and that the measure is the mean of its column."""
    assert "items" not in case.results(), "there are items, and `subject.items` is false"
    results = case.results(items=True)
    items = results.get("items")
    if items is None:
        return
    assert isinstance(items, Mapping), f"the items are {type(items).__name__}, not lists by column"
    lengths = {name: len(column) for name, column in items.items()}
    assert len(set(lengths.values())) == 1, f"the columns of the items differ in length: {lengths}"
    names = items.get("id", [])
    assert names, "the items have no column `id`, or there is none"
    assert all(isinstance(name, str) for name in names), "an item's `id` is no text"
    assert len(set(names)) == len(names), "several items have the same `id`"
    for name, column in items.items():
        numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in column)
        texts = all(isinstance(value, str) for value in column)
        assert numbers or texts, f"column {name!r} of the items holds neither finite numbers alone nor texts alone"
    measure = case.evaluator.measure
    if measure in items:
        mean = math.fsum(items[measure]) / len(names)
        same = math.isclose(mean, results[measure], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        assert same, f"{measure} is {results[measure]}, and the mean of its items {mean}"


def the_model_stays_as_it_is(case: Case) -> None:
    """Check weights, buffers, modes, gradients and what requires them."""
    model = case.model()
    module, before = model.module, case.model().module
    frozen = next(module.parameters())
    frozen.requires_grad_(False)
    case.results(model)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), f"evaluating changes {name}"
    for name, parameter in module.named_parameters():
        kept = parameter.requires_grad == (parameter is not frozen)
        assert kept, f"evaluating sets requires_grad of {name} to {parameter.requires_grad}"
        assert parameter.grad is None, f"evaluating leaves a gradient of {name}"
    training = [name or "the model" for name, part in module.named_modules() if part.training]
    assert not training, f"evaluating leaves {training[0]} in training mode"


def _values(results: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each single value of nested results by its full name, without times."""
    items: Any = results.items() if isinstance(results, Mapping) else enumerate(results)
    for key, value in items:
        full = f"{name}.{key}" if name else str(key)
        if str(key).endswith(("second", "seconds")):
            continue
        if isinstance(value, Mapping | list | tuple):
            yield from _values(value, full)
        else:
            yield full, value


KIT = Kit(
    by_name(
        it_evaluates_a_model,
        *where_present(
            "example",
            results_are_what_json_holds,
            the_same_twice,
            the_batch_size_has_no_say,
            items_are_one_record_each,
            the_model_stays_as_it_is,
        ),
    ),
    cases,
    Case,
)
