"""Accuracy of an image classifier, by ImageNet's protocol."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pruneforge import Evaluator, ImageProcessor, ImageSet, ImageSource, PruneForgeError, Subject
from pruneforge.data.evaluation import image_batches, spread, unique_names
from pruneforge.data.images import Reading, image_processor
from pruneforge.documents import read_json

CONFUSED = 10
"""Pairs of classes to list that are taken for one another most often."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        top: Its five likeliest classes among the choices, the likeliest first.
        loss: Cross-entropy of the image's class among the choices.
    """

    top: list[int]
    loss: float


class ImageNet(Evaluator):
    """Top-1 and top-5 accuracy over labelled images, by the checkpoint's own evaluation preprocessing.

    With `real_labels` (Beyer et al., Are we done with ImageNet?, 2020) an image has a set of right classes, and
    those with none are left out. With `present_only` the model chooses among the classes that occur in the data, as
    the accuracies on ImageNet-R (Hendrycks et al., The Many Faces of Robustness, 2021) and ImageNet-A (Hendrycks et
    al., Natural Adversarial Examples, 2021) are measured, which hold 200 of the 1000 classes.
    """

    argument: ClassVar[str | None] = "data"

    measure = "top1"
    higher_is_better = True
    share = True
    measured = frozenset({"images_per_second"})

    class Options(Evaluator.Options):
        """Options of the ImageNet evaluator."""

        data: str = Field("imagenet", description="source or path of the labelled images")
        limit: int | None = Field(None, ge=1, description="only so many images, spread evenly over the data")
        workers: int | None = Field(None, ge=0, le=1_000, description="processes that read images; by default by cores")
        amp: bool = Field(False, description="compute in bfloat16 by torch.autocast, sums in float32")
        real_labels: str | None = Field(
            None, description="JSON list of the right classes of each image, by name's order"
        )
        present_only: bool = Field(
            False, description="choose among the classes that occur in the data; logits of the others are left out"
        )
        strict: bool = Field(False, description="fail on a corrupt image instead of leaving it out with a count")
        source_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return accuracies with 95 % intervals, images a second, and accuracy by class.

        Items are the images that count, by name: whether `top1` and `top5` are right (1) or wrong (0), and the `loss`.
        """
        source = subject.source(self.options.data, self.options.source_options)
        if not isinstance(source, ImageSource):
            raise PruneForgeError(f"imagenet needs images, and source {source.name!r} gives none")
        processor = image_processor(subject.model.processor)
        images = source.images("evaluation")
        labels = [label for label in source.labels(images, processor) if label is not None]
        if len(labels) < len(images):
            raise PruneForgeError(f"{self.options.data!r} holds images without a class; put each class in a folder")
        choices = torch.zeros(processor.classes, dtype=torch.bool)
        choices[labels if self.options.present_only else slice(None)] = True
        truth = self._truth(labels, images, processor.classes)
        start = time.perf_counter()
        predicted, reading = self._predicted(subject, source, images, labels, choices)
        seconds = time.perf_counter() - start
        return {
            **self._results(source, predicted, truth, reading, processor, seconds),
            "classes": int(choices.sum()),
            "image_size": "x".join(map(str, processor.image_size)) if processor.image_size else None,
            "crop": processor.crop,
            **({"items": _items(images, predicted, truth)} if subject.items else {}),
        }

    def _truth(self, labels: list[int], images: ImageSet, classes: int) -> list[set[int]]:
        """Return the right classes of each image."""
        if self.options.real_labels is None:
            return [{label} for label in labels]
        real = read_json(Path(self.options.real_labels), "real labels")
        by_name = sorted(range(len(images)), key=lambda index: os.path.basename(images.name(index)))
        if not isinstance(real, list) or len(real) != len(images):
            count = len(real) if isinstance(real, list) else "no list of"
            raise PruneForgeError(f"there are {count} real labels and {len(images)} images")
        known = set(range(classes))
        if not all(isinstance(right, list) and known.issuperset(right) for right in real):
            raise PruneForgeError(f"real labels must be a list of classes from 0 to {classes - 1} for each image")
        position = {index: place for place, index in enumerate(by_name)}
        return [set(real[position[index]]) for index in range(len(images))]

    def _predicted(
        self, subject: Subject, source: ImageSource, images: ImageSet, labels: list[int], choices: Tensor
    ) -> tuple[dict[int, Prediction], Reading]:
        """Return what is predicted for each readable image, by its index, and what became of the others.

        Args:
            subject: The model.
            source: The source of the images.
            images: The images.
            labels: The class of each image.
            choices: Which classes the model chooses among, boolean [classes].
        """
        module, adapter = subject.model.module, subject.model.adapter
        predicted: dict[int, Prediction] = {}
        reading, strict = Reading(), self.options.strict or source.options.strict
        chosen = spread(len(images), self.options.limit)
        batches = image_batches(subject, images, chosen, reading, workers=self.options.workers, strict=strict)
        left_out, likeliest = ~choices.to(subject.device), min(5, int(choices.sum()))
        amp = torch.autocast(subject.device.type, torch.bfloat16) if self.options.amp else nullcontext()
        with torch.inference_mode(), amp:
            for indices, pixels in batches:
                batch = adapter.batch(pixels, module).to(subject.device)
                logits = adapter.logits(adapter.forward(module, batch))
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(left_out, -torch.inf)
                top = logits.topk(likeliest, dim=1).indices.tolist()
                truth = torch.tensor([labels[index] for index in indices], device=logits.device)
                losses = F.cross_entropy(logits, truth, reduction="none").tolist()
                predicted |= {index: Prediction(*each) for index, *each in zip(indices, top, losses, strict=True)}
        return predicted, reading

    def _results(
        self,
        source: ImageSource,
        predicted: dict[int, Prediction],
        truth: list[set[int]],
        reading: Reading,
        processor: ImageProcessor,
        seconds: float,
    ) -> dict[str, Any]:
        counted = [index for index in predicted if truth[index]]
        if not counted:
            raise PruneForgeError(f"{self.options.data!r} holds no readable, labelled image")
        first = [predicted[index].top[0] in truth[index] for index in counted]
        fifth = [not truth[index].isdisjoint(predicted[index].top) for index in counted]
        by_class: dict[int, list[bool]] = {}
        for index, right in zip(counted, first, strict=True):
            for label in truth[index]:
                by_class.setdefault(label, []).append(right)
        names = processor.names or [str(index) for index in range(processor.classes)]
        if len(set(names)) < len(names):  # several classes called alike: a crane is a bird and a machine
            names = [f"{name} ({index})" for index, name in enumerate(names)]
        accuracy = {names[label]: round(sum(rights) / len(rights), 6) for label, rights in sorted(by_class.items())}
        wrong = Counter(
            (names[label], names[predicted[index].top[0]])
            for index in counted
            for label in truth[index]
            if predicted[index].top[0] not in truth[index]
        )
        return {
            "top1": sum(first) / len(first),
            "top1_interval": interval(sum(first), len(first)),
            "top5": sum(fifth) / len(fifth),
            "top5_interval": interval(sum(fifth), len(fifth)),
            "images": len(counted),
            "skipped": len(reading.corrupt),
            "images_per_second": len(predicted) / seconds,
            "data": {"source": self.options.data, **source.describe("evaluation")},
            "labels": "real" if self.options.real_labels else "folder",
            "class_accuracy": accuracy,
            "confused": [{"class": a, "taken_for": b, "images": n} for (a, b), n in wrong.most_common(CONFUSED)],
            "loss": math.fsum(predicted[index].loss for index in counted) / len(counted),
            "warnings": reading.warnings(),
        }


def _items(
    images: ImageSet, predicted: dict[int, Prediction], truth: list[set[int]]
) -> dict[str, list[str] | list[int] | list[float]]:
    """Return a record of each image that counts, in the order of the data."""
    counted = [index for index in predicted if truth[index]]
    tops = [(truth[index], predicted[index].top) for index in counted]
    return {
        "id": unique_names(images, counted),
        "top1": [int(top[0] in right) for right, top in tops],
        "top5": [int(not right.isdisjoint(top)) for right, top in tops],
        "loss": [predicted[index].loss for index in counted],
    }


def interval(right: int, total: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    z = 1.959964
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return [max(0.0, centre - half), min(1.0, centre + half)]
