"""Sources and evaluators keep their promises, and each check catches one that breaks its promise."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from pruneforge import Evaluator, PruneForgeError, Source, create
from pruneforge.testing import check_evaluator, check_source, run_checks
from pruneforge.testing.source import Case


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = [f"word{number} of a text" for number in np.random.default_rng(0).integers(0, 1000, 400)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(words))
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """As many classes as the image models of the examples have, which is 7."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, index in itertools.product("0123456", range(3)):
        (folder / label).mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(folder / label / f"{index}.png")
    return folder


def test_first_party_sources_keep_their_promises(text, pictures):
    for source in (
        create("source", "text", path=str(text)),
        create("source", "text", path=str(text), pack=True),
        create("source", "images", path=str(pictures)),
        create("source", "images", path=str(pictures), balanced=True),
        create("source", "digits"),
        create("source", "python-docs"),
    ):
        assert check_source(source) is None  # it raises otherwise


def test_first_party_evaluators_keep_their_promises(text, pictures):
    assert check_evaluator(create("evaluator", "perplexity", data=str(text), window=16)) is None
    assert check_evaluator(create("evaluator", "imagenet", data=str(pictures), workers=0)) is None


class Good(Source):
    """Token ids drawn from a generator of the seed, of which there are few."""

    available = 50

    def calibration(self, request):
        if request.samples > self.available:
            raise PruneForgeError(f"there are {self.available} samples; use fewer `samples`")
        yield from self.batches(request, torch.Generator().manual_seed(self.seed(request)))

    def seed(self, request):
        return request.seed

    def batches(self, request, generator):
        ids = torch.randint(3, 250, (request.samples, request.seqlen), generator=generator)
        for part in ids.split(request.batch_size):
            yield {"input_ids": part}


class Empty(Good):
    available = 2


class Whole(Good):
    """One batch, of whatever size."""

    def batches(self, request, generator):
        yield {"input_ids": torch.randint(3, 250, (request.samples, request.seqlen), generator=generator)}


class Long(Good):
    def batches(self, request, generator):
        for batch in super().batches(request, generator):
            yield {"input_ids": batch["input_ids"].repeat(1, 2)}


class Moving(Good):
    """Goes on where the last draw ended."""

    draws = itertools.count()

    def seed(self, request):
        return request.seed + 100 * next(self.draws)


class Fixed(Good):
    def seed(self, request):
        return 0


class Unseeded(Good):
    seeded = False


class Silent(Good):
    """Gives fewer samples than were asked for."""

    def calibration(self, request):
        ids = torch.randint(3, 250, (50, request.seqlen), generator=torch.Generator().manual_seed(request.seed))
        for part in ids[: request.samples].split(request.batch_size):
            yield {"input_ids": part}


class Wordy(Good):
    def calibration(self, request):
        try:
            yield from super().calibration(request)
        except PruneForgeError as error:
            raise PruneForgeError(f"{error}\nand so on") from None


class Failing(Good):
    def calibration(self, request):
        assert request.samples <= self.available
        yield from self.batches(request, torch.Generator().manual_seed(request.seed))


class Tuples(Good):
    def describe(self, part):
        return {"rows": (0, 50)}


class Seeding(Good):
    def batches(self, request, generator):
        torch.manual_seed(request.seed)
        yield from super().batches(request, generator)


class Python(Good):
    def batches(self, request, generator):
        random.seed(request.seed)
        yield from super().batches(request, generator)


SOURCES = {
    Empty: "it gives data",
    Whole: "samples and lengths are as asked for",
    Long: "samples and lengths are as asked for",
    Moving: "the same seed draws the same",
    Fixed: "another seed draws others",
    Unseeded: "another seed draws others",
    Silent: "too few data are one clear error",
    Wordy: "too few data are one clear error",
    Failing: "too few data are one clear error",
    Tuples: "descriptions are what json holds",
    Seeding: "global random numbers have no say",
    Python: "global random numbers have no say",
}


def test_a_good_source_passes_everything_also_if_it_says_that_its_draws_are_all_the_same():
    assert check_source(Good()) is None
    assert check_source(type("Fixed", (Fixed,), {"seeded": False})()) is None


@pytest.mark.parametrize("broken", SOURCES)
def test_a_broken_source_is_caught_by_the_check_of_what_it_breaks(broken):
    failed = {check.name: said for check, said in run_checks([broken()]) if said is not None}
    assert SOURCES[broken] in failed, failed
    # One draw after another differs, whatever the check compares.
    assert set(failed) <= {SOURCES[broken]} | ({"global random numbers have no say"} if broken is Moving else set())


def test_a_source_can_be_checked_for_a_processor_of_one_s_own(text):
    class Letters:
        def __call__(self, text, verbose):
            return {"input_ids": [ord(letter) for letter in text]}

    case = Case(create("source", "text", path=str(text)), Letters(), seqlen=5)
    assert {said for _, said in run_checks([case])} == {None}


class Steady(Evaluator):
    """The mean loss of a few made-up texts, each on its own."""

    def evaluate(self, subject):
        model, losses = subject.model, []
        ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(subject.seed))
        with torch.no_grad():
            for part in ids.split(subject.batch_size):
                batch = model.adapter.batch(part, model.module)
                losses.append(model.adapter.losses(model.adapter.forward(model.module, batch), batch))
        return {"loss": self.mean(losses), "warnings": []}

    def mean(self, losses):
        return torch.cat(losses).double().mean().item()


class Choosy(Steady):
    def evaluate(self, subject):
        raise PruneForgeError("not this model")


class Tensors(Steady):
    def mean(self, losses):
        return torch.cat(losses).mean()


class Infinite(Steady):
    def mean(self, losses):
        return float("nan")


class Drawing(Steady):
    def mean(self, losses):
        return super().mean(losses) + torch.rand(()).item()


class Timed(Steady):
    calls = itertools.count()

    def evaluate(self, subject):
        return {**super().evaluate(subject), "samples_per_second": next(self.calls)}


class Measuring(Steady):
    """Says what it measured, which the batch size decides."""

    measured = frozenset({"size"})

    def evaluate(self, subject):
        return {**super().evaluate(subject), "size": {"batch": subject.batch_size, "call": next(Timed.calls)}}


class ByBatch(Steady):
    """The mean over batches, of which the last is smaller."""

    def mean(self, losses):
        return torch.stack([part.mean() for part in losses]).double().mean().item()


class Halving(Steady):
    def evaluate(self, subject):
        results = super().evaluate(subject)
        next(iter(subject.model.module.parameters())).data *= 0.5
        return results


class Training(Steady):
    def evaluate(self, subject):
        subject.model.module.train()
        subject.model.module.eval()
        subject.model.module.get_output_embeddings().train()
        return super().evaluate(subject)


class Freezing(Steady):
    def evaluate(self, subject):
        subject.model.module.requires_grad_(False)
        return super().evaluate(subject)


class Itemised(Steady):
    """Keeps a record of each text."""

    def evaluate(self, subject):
        results = super().evaluate(subject)
        return {**results, "items": self.items(results["loss"])} if subject.items else results

    def items(self, loss):
        return {
            "id": ["a", "b", "c", "d"],
            "loss": [loss + off for off in (0.5, -0.5, 1, -1)],
            "right": [1, 0, 1, 1],
            "said": ["no", "yes", "", "no"],
        }


class Ragged(Itemised):
    def items(self, loss):
        return {**super().items(loss), "right": [1, 0, 1]}


class Nameless(Itemised):
    def items(self, loss):
        return {"loss": super().items(loss)["loss"]}


class Numbered(Itemised):
    def items(self, loss):
        return {**super().items(loss), "id": [0, 1, 2, 3]}


class Repeated(Itemised):
    def items(self, loss):
        return {**super().items(loss), "id": ["a", "b", "c", "a"]}


class Worded(Itemised):
    def items(self, loss):
        return {**super().items(loss), "right": ["yes", 0, "yes", "yes"]}


class Astray(Itemised):
    """Items of which the measure is not the mean."""

    def items(self, loss):
        return {**super().items(loss), "loss": [loss, loss, loss, loss + 1]}


class Unasked(Itemised):
    def evaluate(self, subject):
        results = super().evaluate(subject)
        return {**results, "items": self.items(results["loss"])}


EVALUATORS = {
    **dict.fromkeys((Ragged, Nameless, Numbered, Repeated, Worded, Astray, Unasked), "items are one record each"),
    Choosy: "it evaluates a model",
    Tensors: "results are what json holds",
    Infinite: "results are what json holds",
    Drawing: "the same twice",
    ByBatch: "the batch size has no say",
    Halving: "the model stays as it is",
    Training: "the model stays as it is",
    Freezing: "the model stays as it is",
}


@pytest.mark.parametrize("good", [Steady, Timed, Measuring, Itemised])
def test_a_good_evaluator_passes_everything(good):
    assert check_evaluator(good()) is None


@pytest.mark.parametrize("broken", EVALUATORS)
def test_a_broken_evaluator_is_caught_by_the_check_of_what_it_breaks(broken):
    failed = {check.name: said for check, said in run_checks([broken()]) if said is not None}
    assert EVALUATORS[broken] in failed, failed
    # What is no number compares with nothing, and what is drawn with no other draw.
    vague = {"the same twice", "the batch size has no say"} if broken in (Tensors, Infinite, Drawing) else set()
    assert set(failed) <= {EVALUATORS[broken]} | vague
