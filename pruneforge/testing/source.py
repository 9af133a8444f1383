"""What every source promises, checked on draws for the processors of adapters' examples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruneforge.data.images import ImageProcessor, ImageSource
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.source import Request, Source
from pruneforge.testing.kit import Kit, by_name, where_present
from pruneforge.testing.models import examples, first_that_works

SAMPLES, SEQLEN, BATCH_SIZE, SEED = 4, 16, 3, 7
TOO_MANY, ENOUGH = 1_000_000, 64

Batches = list[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A source, and what its draws are checked for.

    Attributes:
        source: The source.
        processor: Tokenizer or image transform; `None` if the source gives data for none that was tried.
        seqlen: Tokens in a sample.
        reason: Why it gives data for none.
    """

    source: Source
    processor: Any = None
    seqlen: int = SEQLEN
    reason: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.source.name

    def request(self, samples: int = SAMPLES, seed: int = SEED) -> Request:
        """Return a request for batches of three."""
        return Request(self.processor, samples, self.seqlen, BATCH_SIZE, seed)

    def draw(self, samples: int = SAMPLES, seed: int = SEED) -> Batches:
        """Return a draw."""
        return list(self.source.calibration(self.request(samples, seed)))


def cases(source: Source) -> Sequence[Case]:
    """Return the source with the first processor, of one example of each adapter, that it gives data for."""
    processors = [example.processor for _, example in examples(each=1) if example.processor is not None]

    def drawn(processor: Any) -> Case:
        case = Case(source, _fitted(processor, source))
        case.draw()
        return case

    case, reason = first_that_works(processors, drawn)
    return [case or Case(source, reason=reason)]


def _fitted(processor: Any, source: Source) -> Any:
    """Return a processor that knows as many classes as the images of a source have."""
    if not isinstance(source, ImageSource) or not isinstance(processor, ImageProcessor):
        return processor
    images = source.images("calibration")
    labels = {images.label(index) for index in range(len(images))} - {None}
    numbers = [label + 1 for label in labels if isinstance(label, int)]
    classes = len(images.class_names) if images.class_names else max([len(labels), *numbers])
    return replace(processor, classes=classes, names=images.class_names)


def it_gives_data(case: Case) -> None:
    """Check that four samples can be drawn for a text model or an image model."""
    assert case.processor is not None, f"it gives no {SAMPLES} samples for any of the adapters' examples: {case.reason}"


def samples_and_lengths_are_as_asked_for(case: Case) -> None:
    """Check the number of samples, the size of each batch, and the number of tokens."""
    batches, sizes = case.draw(), []
    for batch in batches:
        assert isinstance(batch, Mapping), f"a batch is {type(batch).__name__}, not a mapping of names to tensors"
        for name, value in batch.items():
            assert isinstance(value, Tensor), f"{name} of a batch is {type(value).__name__}, not a tensor"
        lengths = {name: len(value) for name, value in batch.items()}
        assert len(set(lengths.values())) == 1, f"the tensors of a batch differ in their number of samples: {lengths}"
        sizes.append(next(iter(lengths.values())))
        ids = batch.get("input_ids")
        assert ids is None or ids.shape[1] == case.seqlen, f"samples have {ids.shape[1:]} tokens, not {case.seqlen}"
    asked = [BATCH_SIZE, SAMPLES - BATCH_SIZE]
    assert sizes == asked, f"{SAMPLES} samples in batches of {BATCH_SIZE} come as {sizes}, not {asked}"


def the_same_seed_draws_the_same(case: Case) -> None:
    """Check that two draws of one seed agree, whatever was drawn in between."""
    first = case.draw()
    case.draw(seed=SEED + 1)
    assert _equal(first, case.draw()), "two draws of one seed differ"


def another_seed_draws_others(case: Case) -> None:
    """Check that draws of several seeds differ, unless the source says by `seeded` that they do not."""
    first = case.draw()
    alike = all(_equal(first, case.draw(seed=SEED + step)) for step in (1, 2, 3))
    if case.source.seeded:
        assert not alike, "draws of all seeds are the same; use `request.seed`, or say so: seeded = False"
    else:
        assert alike, "draws of two seeds differ, and the source says seeded = False"


def too_few_data_are_one_clear_error(case: Case) -> None:
    """Check that a million samples raise one line, or that there are enough to go on for a while."""
    given, error = 0, None
    try:
        given = sum(1 for _ in islice(case.source.calibration(case.request(TOO_MANY)), ENOUGH))
    except Exception as raised:  # a plugin may fail in any way
        error = raised
    if error is None:
        said = f"{TOO_MANY} samples were asked for, and about {given * BATCH_SIZE} come without an error"
        assert given == ENOUGH, said
    else:
        kind = type(error).__name__
        assert isinstance(error, PruneForgeError), f"too few data are {kind}, not one PruneForgeError: {error}"
        assert "\n" not in str(error).strip(), f"the error for too few data has several lines: {error}"


def descriptions_are_what_json_holds(case: Case) -> None:
    """Check that `describe` gives the same before and after JSON, and `warnings` one line each."""
    case.draw()
    for part in ("calibration", "evaluation"):
        said = case.source.describe(part)
        assert json.loads(json.dumps(said)) == said, f"what `describe` returns of {part} data changes as JSON: {said}"
    for line in case.source.warnings():
        assert isinstance(line, str), f"a warning is {line!r}, not a text"
        assert "\n" not in line, f"a warning has several lines: {line!r}"


def global_random_numbers_have_no_say(case: Case) -> None:
    """Check that draws neither use nor change the random state of torch, Python and numpy."""
    drawn = []
    for seed in (1, 2):
        with seeded_globally(seed):
            before = _states()
            drawn.append(case.draw())
            changed = [name for name, state in _states().items() if state != before[name]]
            assert not changed, (
                f"drawing changes the random state of {', '.join(changed)}; make a generator of the seed"
            )
    assert _equal(*drawn), "a draw depends on the global random state; use `request.seed` alone"


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """Seed the global random numbers within the context, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _states() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().tolist(),
        "Python": random.getstate(),
        "numpy": str(state),
    }


def _equal(one: Batches, two: Batches) -> bool:
    if len(one) != len(two) or any(a.keys() != b.keys() for a, b in zip(one, two, strict=True)):
        return False
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a)


KIT = Kit(
    by_name(
        it_gives_data,
        *where_present(
            "processor",
            samples_and_lengths_are_as_asked_for,
            the_same_seed_draws_the_same,
            another_seed_draws_others,
            too_few_data_are_one_clear_error,
            descriptions_are_what_json_holds,
            global_random_numbers_have_no_say,
        ),
    ),
    cases,
    Case,
)
