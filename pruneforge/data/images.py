"""Images as calibration and evaluation data."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces import options
from pruneforge.interfaces.source import Request, Source


@dataclass(frozen=True)
class ImageProcessor:
    """How a checkpoint wants its images, and what its classes are called.

    Attributes:
        transform: From an image to a tensor [channels, height, width], by the checkpoint's own evaluation
            preprocessing.
        mode: Colour mode the images are converted to before (`"RGB"`, or `"L"` for one channel).
        classes: How many classes the head has.
        names: What the classes are called in an image folder, in the head's order, if that is known.
        native: The library's own processor, for saving; `None` where the model itself holds it.
    """

    transform: Callable[[Image.Image], Tensor] = field(repr=False)
    mode: str
    classes: int
    names: Sequence[str] | None = None
    native: Any = None


class ImageSet(ABC):
    """Images that can be opened one by one, from any process.

    Attributes:
        class_names: What the data set calls its classes, where labels are class indices and it says so.
    """

    class_names: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return an image, decoded.

        Raises:
            OSError: It is corrupt or truncated (as PIL says).
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what to call an image in a message."""

    @abstractmethod
    def label(self, index: int) -> str | int | None:
        """Return an image's class: its folder's name, a class index, or `None` if it has none."""


class ImageSource(Source):
    """A source of images.

    Attributes:
        reading: What the last draw left out or converted.
    """

    class Options(options.Options):
        """Options of every image source."""

        balanced: bool = Field(False, description="draw as equally many images of each class as can be")
        strict: bool = Field(False, description="fail on a corrupt image instead of leaving it out with a count")

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reading = Reading()

    @abstractmethod
    def images(self, part: Literal["calibration", "evaluation"]) -> ImageSet:
        """Return the images for "calibration" or "evaluation"; a source without parts returns the same for both.

        Raises:
            PruneForgeError: There are none.
        """

    def calibration(self, request: Request) -> Iterable[Mapping[str, Tensor]]:
        """Yield `{"pixel_values": float [samples, channels, height, width], "labels": int64 [samples]}`.

        Images are drawn without replacement and put through the checkpoint's evaluation transform. Without
        labels in the source, batches have none.

        Raises:
            PruneForgeError: There are too few images, or one is corrupt and `strict` is set.
        """
        processor = image_processor(request.processor)
        images = self.images("calibration")
        order = draw_order(images, request.seed, self.options.balanced)
        labels = class_indices(images, processor)
        self.reading = Reading()
        drawn: list[tuple[Tensor, int | None]] = []
        for index in request.progress.track(order, "reading images", request.samples):
            if len(drawn) == request.samples:
                break
            loaded = load_image(images, index, processor)
            self.reading.note(images.name(index), loaded, processor.mode, self.options.strict)
            if loaded.pixels is not None:
                drawn.append((loaded.pixels, labels[index]))
        if len(drawn) < request.samples:
            raise PruneForgeError(
                f"source {self.name!r} has {len(drawn)} readable images and {request.samples} were asked for; "
                "use fewer `samples`"
            )
        for start in range(0, len(drawn), request.batch_size):
            chunk = drawn[start : start + request.batch_size]
            batch = {"pixel_values": torch.stack([pixels for pixels, _ in chunk])}
            if all(label is not None for _, label in chunk):
                batch["labels"] = torch.tensor([label for _, label in chunk])
            yield batch

    def warnings(self) -> list[str]:
        """Return what the last draw left out or converted."""
        return self.reading.warnings()


def image_processor(processor: Any) -> ImageProcessor:
    """Return the processor if it is one for images.

    Raises:
        PruneForgeError: It is none.
    """
    if not isinstance(processor, ImageProcessor):
        raise PruneForgeError("the model takes no images, or came without its preprocessing; use another source")
    return processor


@dataclass
class Reading:
    """What became of images on their way in.

    Attributes:
        corrupt: Names of those that could not be read.
        converted: Names of those in another colour mode than the model takes, by that mode.
    """

    corrupt: list[str] = field(default_factory=list)
    converted: dict[str, list[str]] = field(default_factory=dict)

    def note(self, name: str, loaded: Loaded, wanted: str, strict: bool) -> None:
        """Note what became of an image that should have colour mode `wanted`.

        Raises:
            PruneForgeError: It is corrupt and `strict` is set.
        """
        if loaded.pixels is None:
            if strict:
                raise PruneForgeError(f"image {name!r} is corrupt: {' '.join(loaded.error.split())}")
            self.corrupt.append(name)
        elif loaded.mode != wanted:
            self.converted.setdefault(f"{loaded.mode} to {wanted}", []).append(name)

    def warnings(self) -> list[str]:
        """Return a line for each thing that happened, with a count and the first names."""
        lines = [f"{len(self.corrupt)} corrupt images were left out: {_some(self.corrupt)}"] if self.corrupt else []
        for modes, names in sorted(self.converted.items()):
            lines.append(f"{len(names)} images were converted from colour mode {modes}: {_some(names)}")
        return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True)
class Loaded:
    """An image on its way in.

    Attributes:
        pixels: [channels, height, width], or `None` if the image is corrupt.
        mode: The colour mode it had.
        error: Why it is corrupt.
    """

    pixels: Tensor | None
    mode: str = ""
    error: str = ""


def load_image(images: ImageSet, index: int, processor: ImageProcessor) -> Loaded:
    """Open and preprocess an image."""
    try:
        image = images.open(index)
        converted = image.convert(processor.mode)
    except Exception as error:  # damaged files make archives and PIL raise nearly anything
        return Loaded(None, error=f"{type(error).__name__}: {error}")
    return Loaded(processor.transform(converted), image.mode)


def draw_order(images: ImageSet, seed: int, balanced: bool) -> list[int]:
    """Return all indices in random order; balanced, so that any first part holds the classes equally."""
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    if not balanced:
        return order
    turns: dict[Any, int] = {}
    turn = {}
    for index in order:
        label = images.label(index)
        turn[index] = turns[label] = turns.get(label, -1) + 1
    return sorted(order, key=lambda index: turn[index])


def class_indices(images: ImageSet, processor: ImageProcessor) -> list[int | None]:
    """Return each image's class as the head counts it.

    Names that are all among the head's class names (WordNet ids, say) map by name, so a folder may hold a
    subset. Otherwise the data's own classes (a folder's names, sorted) are the head's, one by one, and there
    must be as many.

    Raises:
        PruneForgeError: The classes do not fit the head.
    """
    labels = [images.label(index) for index in range(len(images))]
    if images.class_names is not None:
        heads = _heads_classes(images.class_names, processor)
        return [heads[label] if isinstance(label, int) else None for label in labels]
    found = sorted({label for label in labels if isinstance(label, str)})
    if found:
        position = dict(zip(found, _heads_classes(found, processor), strict=True))
        return [position[label] if isinstance(label, str) else None for label in labels]
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and not 0 <= min(numbers) <= max(numbers) < processor.classes:
        raise PruneForgeError(
            f"labels run from {min(numbers)} to {max(numbers)}, and the head has {processor.classes} classes"
        )
    return [label if isinstance(label, int) else None for label in labels]


def _heads_classes(found: Sequence[str], processor: ImageProcessor) -> list[int]:
    """Return the head's index of each of the data's classes."""
    names = list(processor.names or [])
    position = {name: index for index, name in enumerate(names)}
    if set(found) <= set(names) and len(position) == len(names):
        return [position[name] for name in found]
    if len(found) == processor.classes:
        return list(range(len(found)))
    known = f", called like {names[0]!r}" if names else ""
    raise PruneForgeError(
        f"the images have {len(found)} classes, such as {found[0]!r}, and the head has {processor.classes}{known}"
    )
