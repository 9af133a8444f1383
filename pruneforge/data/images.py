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

from pruneforge.data.classes import class_indices, read_mapping
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces import options
from pruneforge.interfaces.source import Request, Source
from pruneforge.memory import is_full_memory


@dataclass(frozen=True)
class ImageProcessor:
    """The preprocessing and class names of a checkpoint.

    Attributes:
        transform: The checkpoint's own evaluation preprocessing, from an image to a tensor [channels, height, width].
        mode: Colour mode that images are converted to first (`"RGB"`, or `"L"` for one channel).
        classes: Number of classes of the head.
        names: Names of the classes in an image folder, in the head's order, if known.
        aliases: Other names of all classes, in the head's order: descriptions beside WordNet ids, for example.
        native: The library's own processor, for saving; `None` if the model contains it.
        image_size: Height and width of what the transform returns, if known.
        crop: Share of the resized image's side that is kept, if known.
    """

    transform: Callable[[Image.Image], Tensor] = field(repr=False)
    mode: str
    classes: int
    names: Sequence[str] | None = None
    aliases: Sequence[Sequence[str]] = ()
    native: Any = None
    image_size: tuple[int, int] | None = None
    crop: float | None = None


class ImageSet(ABC):
    """Images that can be opened one by one, in any process.

    Attributes:
        class_names: The data set's class names if its labels are class indices; `None` if it has no names.
    """

    class_names: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return a decoded image.

        Raises:
            OSError: It is corrupt or truncated, as reported by PIL.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return an image's name for messages."""

    @abstractmethod
    def label(self, index: int) -> str | int | None:
        """Return an image's class: the name of its folder, a class index, or `None` if it has none."""


class ImageSource(Source):
    """A source of images.

    Attributes:
        reading: The images that the last draw left out or converted.
    """

    class Options(options.Options):
        """Options of every image source."""

        balanced: bool = Field(False, description="draw as equally many images of each class as can be")
        strict: bool = Field(False, description="fail on a corrupt image instead of leaving it out with a count")
        classes: str | None = Field(
            None,
            description="JSON file that maps each folder or class of the data to an index or name of the head's; or "
            "position, which takes them in the order of their names, or none, for calibration without labels",
        )

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

    def labels(self, images: ImageSet, processor: ImageProcessor) -> list[int | None]:
        """Return each image's class as an index of the head, or `None` if it has none; see `class_indices`.

        Raises:
            PruneForgeError: The classes do not fit the head, or the file `classes` cannot be read.
        """
        return class_indices(images, processor, read_mapping(self.options.classes))

    def calibration(self, request: Request) -> Iterable[Mapping[str, Tensor]]:
        """Yield batches `{"pixel_values": float [samples, channels, height, width], "labels": int64 [samples]}`.

        Images are drawn without replacement and preprocessed by the checkpoint's evaluation transform. Batches have
        labels only if all their images do; a warning counts the images without.

        Raises:
            PruneForgeError: There are too few images, or one is corrupt and `strict` is set.
        """
        processor = image_processor(request.processor)
        images = self.images("calibration")
        order = draw_order(images, request.seed, self.options.balanced)
        labels = self.labels(images, processor)
        self._check_enough(len(images), request.samples)  # before any is decoded
        self.reading = Reading()
        drawn: list[tuple[Tensor, int | None]] = []
        for index in request.progress.track(order, "reading images", request.samples):
            if len(drawn) == request.samples:
                break
            loaded = load_image(images, index, processor)
            self.reading.note(images.name(index), loaded, processor.mode, self.options.strict)
            if loaded.pixels is not None:
                drawn.append((loaded.pixels, labels[index]))
        self._check_enough(len(drawn), request.samples)
        without = sum(label is None for _, label in drawn)
        self.reading.unlabelled = without if without < len(drawn) else 0
        for start in range(0, len(drawn), request.batch_size):
            chunk = drawn[start : start + request.batch_size]
            batch = {"pixel_values": torch.stack([pixels for pixels, _ in chunk])}
            if all(label is not None for _, label in chunk):
                batch["labels"] = torch.tensor([label for _, label in chunk])
            yield batch

    def _check_enough(self, count: int, samples: int) -> None:
        """Raise if there are fewer images than samples."""
        if count < samples:
            raise PruneForgeError(
                f"source {self.name!r} has {count} readable images and {samples} were asked for; use fewer `samples`"
            )

    def warnings(self) -> list[str]:
        """Return warnings about images that the last draw left out or converted, or that alone have no label."""
        return self.reading.warnings()


def image_processor(processor: Any) -> ImageProcessor:
    """Return the processor if it is an `ImageProcessor`.

    Raises:
        PruneForgeError: It is not.
    """
    if not isinstance(processor, ImageProcessor):
        raise PruneForgeError("the model does not take images, or came without its preprocessing; use another source")
    return processor


@dataclass
class Reading:
    """A record of the images that could not be read, were converted, or lack a label that others have.

    Attributes:
        corrupt: Names of images that could not be read.
        converted: Names of images in another colour mode than the model's, by "MODE to MODE".
        unlabelled: Number of images without a label, where others have one.
    """

    corrupt: list[str] = field(default_factory=list)
    converted: dict[str, list[str]] = field(default_factory=dict)
    unlabelled: int = 0

    def note(self, name: str, loaded: Loaded, wanted: str, strict: bool) -> None:
        """Record an image that should have colour mode `wanted`.

        Raises:
            PruneForgeError: It is corrupt and `strict` is true.
        """
        if loaded.pixels is None:
            if strict:
                raise PruneForgeError(f"image {name!r} is corrupt: {' '.join(loaded.error.split())}")
            self.corrupt.append(name)
        elif loaded.mode != wanted:
            self.converted.setdefault(f"{loaded.mode} to {wanted}", []).append(name)

    def warnings(self) -> list[str]:
        """Return one line for corrupt images and one for each conversion, with a count and the first names."""
        lines = []
        if self.corrupt:
            lines.append(f"{len(self.corrupt)} corrupt images were left out: {_first_few(self.corrupt)}")
        for modes, names in sorted(self.converted.items()):
            lines.append(f"{len(names)} images were converted from colour mode {modes}: {_first_few(names)}")
        if self.unlabelled:
            lines.append(f"{self.unlabelled} images have no label, so their batches count as without labels")
        return lines


def _first_few(names: Sequence[str]) -> str:
    """Return the first three names, as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True)
class Loaded:
    """A preprocessed image.

    Attributes:
        pixels: Float [channels, height, width], or `None` if the image is corrupt.
        mode: Its original colour mode.
        error: Why it is corrupt.
    """

    pixels: Tensor | None
    mode: str = ""
    error: str = ""


def load_image(images: ImageSet, index: int, processor: ImageProcessor) -> Loaded:
    """Open and preprocess an image; a corrupt one is returned with its error."""
    try:
        image = images.open(index)
        converted = image.convert(processor.mode)
    except Exception as error:  # for damaged files, archives and PIL raise many kinds of errors
        if is_full_memory(error):
            raise
        return Loaded(None, error=f"{type(error).__name__}: {error}")
    return Loaded(processor.transform(converted), image.mode)


def draw_order(images: ImageSet, seed: int, balanced: bool) -> list[int]:
    """Return all indices in random order, and if `balanced`, so that every prefix has the classes equally often."""
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    if not balanced:
        return order
    # The first image of each class comes first, then the second of each, and so on.
    turns: dict[Any, int] = {}
    turn = {}
    for index in order:
        label = images.label(index)
        turn[index] = turns[label] = turns.get(label, -1) + 1
    return sorted(order, key=lambda index: turn[index])
