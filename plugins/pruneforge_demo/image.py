"""A small vision transformer trained on handwritten digits, and these digits as an image source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from pruneforge import Demo, ImageSet, ImageSource
from pruneforge_demo import digits


class Digits(ImageSource):
    """The 1797 handwritten digits that scikit-learn carries, 8x8 pixels.

    Calibration and evaluation data are disjoint from each other and from the training data of the demo's model.
    """

    def images(self, part: Any) -> ImageSet:
        """Return the digits of one part."""
        return _DigitSet(part)

    def describe(self, part: Any) -> dict[str, Any]:
        """Return the part's name."""
        return {"part": part}


class _DigitSet(ImageSet):
    """One part of the digits."""

    def __init__(self, part: digits.Part) -> None:
        self._pixels, self._labels = digits.images(part)

    def __len__(self) -> int:
        return len(self._labels)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def name(self, index: int) -> str:
        return f"digit {index}"

    def label(self, index: int) -> int:
        return int(self._labels[index])


class ImageDemo(Demo):
    """A ViT of 0.2 M parameters, trained by `pruneforge_demo.train_images`."""

    title: ClassVar[str] = "vision transformer of 0.2 M parameters, scikit-learn's handwritten digits"
    calibration: ClassVar[str] = "digits"
    samples: ClassVar[int] = 256
    task: ClassVar[str] = "imagenet"
    task_options: ClassVar[dict[str, Any]] = {"data": "digits", "workers": 0}
    result: ClassVar[str] = "top1"

    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint."""
        return Path(__file__).parent / "checkpoints" / "image"
