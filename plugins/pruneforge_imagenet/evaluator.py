"""Accuracy of an image classifier, by ImageNet's protocol."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pruneforge import Evaluator, ImageClassifier, Options, PruneForgeError, Subject
from pruneforge.data.images import (
    ImageProcessor,
    ImageSet,
    ImageSource,
    Loaded,
    Reading,
    class_indices,
    image_processor,
    load_image,
)

CONFUSED = 10
"""Pairs of classes to list that are taken for one another most often."""


class ImageNet(Evaluator):
    """Top-1 and top-5 accuracy over labelled images, by the checkpoint's own evaluation preprocessing.

    With `real_labels` (Beyer et al., Are we done with ImageNet?, 2020) an image has a set of right classes, and
    those with none are left out.
    """

    argument: ClassVar[str | None] = "data"

    measure = "top1"
    higher_is_better = True
    share = True
    measured = frozenset({"images_per_second"})

    class Options(Options):
        """Options of the ImageNet evaluator."""

        data: str = Field("imagenet", description="source or path of the labelled images")
        limit: int | None = Field(None, ge=1, description="only so many images, spread evenly over the data")
        workers: int | None = Field(None, ge=0, description="processes that read images; by default by cores")
        amp: bool = Field(False, description="compute in bfloat16 by torch.autocast, sums in float32")
        real_labels: str | None = Field(
            None, description="JSON list of the right classes of each image, by name's order"
        )
        strict: bool = Field(False, description="fail on a corrupt image instead of leaving it out with a count")
        source_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return accuracies with 95 % intervals, images a second, and accuracy by class."""
        source = subject.source(self.options.data, self.options.source_options)
        if not isinstance(source, ImageSource):
            raise PruneForgeError(f"imagenet needs images, and source {source.name!r} gives none")
        processor = image_processor(subject.model.processor)
        images = source.images("evaluation")
        labels = class_indices(images, processor)
        if any(label is None for label in labels):
            raise PruneForgeError(f"{self.options.data!r} holds images without a class; put each class in a folder")
        chosen = _spread(len(images), self.options.limit)
        truth = self._truth(labels, chosen, images, processor.classes)
        start = time.perf_counter()
        ranks, losses, reading = self._ranks(subject, source, images, chosen, labels)
        seconds = time.perf_counter() - start
        results = self._results(source, ranks, truth, reading, processor, seconds)
        return {**results, "loss": float(torch.tensor(losses, dtype=torch.float64).mean())}

    def _truth(self, labels: list[Any], chosen: list[int], images: ImageSet, classes: int) -> list[set[int]]:
        """Return the right classes of each chosen image."""
        if self.options.real_labels is None:
            return [{labels[index]} for index in chosen]
        try:
            real = json.loads(Path(self.options.real_labels).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PruneForgeError(f"real labels {self.options.real_labels!r} cannot be read: {error}") from error
        by_name = sorted(range(len(images)), key=lambda index: os.path.basename(images.name(index)))
        if len(real) != len(images):
            raise PruneForgeError(f"there are {len(real)} real labels and {len(images)} images")
        known = set(range(classes))
        if not all(isinstance(right, list) and known.issuperset(right) for right in real):
            raise PruneForgeError(f"real labels must be a list of classes from 0 to {classes - 1} for each image")
        position = {index: place for place, index in enumerate(by_name)}
        return [set(real[position[index]]) for index in chosen]

    def _ranks(
        self, subject: Subject, source: ImageSource, images: ImageSet, chosen: list[int], labels: list[Any]
    ) -> tuple[dict[int, Tensor], list[float], Reading]:
        """Return each readable image's five likeliest classes and its loss, and what became of the others."""
        size = subject.batch_size or 64
        workers = self.options.workers if self.options.workers is not None else max(1, _cores() - 1)
        processor = image_processor(subject.model.processor)
        dataset = _Preprocessed(images, processor, chosen)
        loader = DataLoader(dataset, size, num_workers=workers, collate_fn=list, prefetch_factor=2 if workers else None)
        module, adapter = subject.model.module, subject.model.adapter
        assert isinstance(adapter, ImageClassifier)  # it made the processor
        ranks: dict[int, Tensor] = {}
        losses: list[float] = []
        reading, strict = Reading(), self.options.strict or source.options.strict
        amp = torch.autocast(subject.device.type, torch.bfloat16) if self.options.amp else nullcontext()
        with torch.inference_mode(), amp:
            for items in subject.progress.track(loader, "imagenet"):
                for place, loaded in items:
                    reading.note(images.name(chosen[place]), loaded, processor.mode, strict)
                places = [place for place, loaded in items if loaded.pixels is not None]
                if not places:
                    continue
                truth = torch.tensor([labels[chosen[place]] for place in places])
                pixels = torch.stack([loaded.pixels for _, loaded in items if loaded.pixels is not None])
                batch = adapter.batch({"pixel_values": pixels, "labels": truth}, module).to(subject.device)
                output = adapter.forward(module, batch)
                losses += adapter.losses(output, batch).tolist()
                logits = adapter.logits(output).float()
                top = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
                ranks |= dict(zip(places, top, strict=True))
        return ranks, losses, reading

    def _results(
        self,
        source: ImageSource,
        ranks: dict[int, Tensor],
        truth: list[set[int]],
        reading: Reading,
        processor: ImageProcessor,
        seconds: float,
    ) -> dict[str, Any]:
        counted = [place for place in ranks if truth[place]]
        if not counted:
            raise PruneForgeError(f"{self.options.data!r} holds no readable, labelled image")
        first = [int(ranks[place][0]) in truth[place] for place in counted]
        fifth = [bool(truth[place] & set(ranks[place].tolist())) for place in counted]
        by_class: dict[int, list[bool]] = {}
        for place, right in zip(counted, first, strict=True):
            for label in truth[place]:
                by_class.setdefault(label, []).append(right)
        names = processor.names or [str(index) for index in range(processor.classes)]
        if len(set(names)) < len(names):  # several classes called alike: a crane is a bird and a machine
            names = [f"{name} ({index})" for index, name in enumerate(names)]
        accuracy = {names[label]: round(sum(rights) / len(rights), 6) for label, rights in sorted(by_class.items())}
        wrong = Counter(
            (names[label], names[int(ranks[place][0])])
            for place in counted
            for label in truth[place]
            if int(ranks[place][0]) not in truth[place]
        )
        return {
            "top1": sum(first) / len(first),
            "top1_interval": interval(sum(first), len(first)),
            "top5": sum(fifth) / len(fifth),
            "top5_interval": interval(sum(fifth), len(fifth)),
            "images": len(counted),
            "skipped": len(reading.corrupt),
            "images_per_second": len(ranks) / seconds,
            "data": {"source": self.options.data, **source.describe("evaluation")},
            "labels": "real" if self.options.real_labels else "folder",
            "class_accuracy": accuracy,
            "confused": [{"class": a, "taken_for": b, "images": n} for (a, b), n in wrong.most_common(CONFUSED)],
            "warnings": reading.warnings(),
        }


def interval(right: int, total: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    z = 1.959964
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return [max(0.0, centre - half), min(1.0, centre + half)]


class _Preprocessed(Dataset):
    def __init__(self, images: ImageSet, processor: ImageProcessor, chosen: list[int]) -> None:
        self.images, self.processor, self.chosen = images, processor, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[int, Loaded]:
        return place, load_image(self.images, self.chosen[place], self.processor)


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread(total: int, limit: int | None) -> list[int]:
    if limit is None or limit >= total:
        return list(range(total))
    return [place * total // limit for place in range(limit)]
