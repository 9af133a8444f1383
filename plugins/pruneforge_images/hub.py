"""Image data sets of the Hub, read with `datasets`."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field
from timm.data import ImageNetInfo

from pruneforge import ImageSet, ImageSource, PruneForgeError

IMAGENET = "ILSVRC/imagenet-1k"


class ImageHub(ImageSource):
    """An image data set of the Hub, `imagenet-1k` by default, read as a stream.

    Calibration reads the first `pool` images of its shuffled split. Evaluation reads its whole split, or the first
    `evaluation_pool` images. Both are kept in a temporary file on disk.
    """

    argument = "path"

    class Options(ImageSource.Options):
        """Options of a Hub data set of images."""

        path: str = Field(IMAGENET, description="OWNER/NAME on the Hub, or a local folder")
        config: str | None = Field(None, description="configuration of the data set")
        calibration_split: str = Field("train", description="split to calibrate on")
        evaluation_split: str = Field("validation", description="split to evaluate on")
        image_column: str = Field("image", description="column that holds the image")
        label_column: str = Field("label", description="column that holds the class index")
        revision: str | None = Field(None, description="branch, tag or commit of the data set")
        pool: int = Field(
            2_000, ge=1, description="draw from the first so many shuffled images of the calibration split"
        )
        evaluation_pool: int | None = Field(
            None, ge=1, description="read only the first so many images of the evaluation split"
        )

    options: Options

    def images(self, part: str) -> ImageSet:
        """Stream the encoded images of one part to a temporary file on disk.

        Raises:
            PruneForgeError: They cannot be loaded.
        """
        import datasets

        options = self.options
        calibrate = part == "calibration"
        split = options.calibration_split if calibrate else options.evaluation_split
        columns = (options.image_column, options.label_column)
        try:
            rows: Any = datasets.load_dataset(
                options.path, options.config, split=split, revision=options.revision, streaming=True
            )
            # Undecoded, so that a corrupt image raises in `open`, where it is counted, and not while streaming.
            rows = rows.cast_column(options.image_column, datasets.Image(decode=False))
            if calibrate:
                rows = rows.shuffle(seed=0, buffer_size=1000).take(options.pool)
            elif options.evaluation_pool is not None:
                rows = rows.take(options.evaluation_pool)
            # Named in words there, of which two classes share one; its order is that of the WordNet ids.
            ids = ImageNetInfo().label_names() if options.path == IMAGENET else None
            return _Rows(rows, *columns, ids)
        except Exception as error:  # datasets, its backends and its readers raise many kinds of errors
            reason = " ".join(str(error).split())[:300]
            raise PruneForgeError(f"images of {options.path!r} ({split}) cannot be loaded: {reason}") from error

    def describe(self, part: str) -> dict[str, Any]:
        """Return where the images come from."""
        options = self.options
        split = options.calibration_split if part == "calibration" else options.evaluation_split
        return {"dataset": options.path, "config": options.config, "split": split, "revision": options.revision}


class _Rows(ImageSet):
    """The rows of a streamed data set, in a temporary file."""

    def __init__(self, rows: Any, image: str, label: str, names: Sequence[str] | None) -> None:
        import datasets

        # On disk and memory-mapped, since ImageNet's validation images are 6 GB.
        self._folder = tempfile.TemporaryDirectory(prefix="pruneforge-images-")
        features = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        self.rows = datasets.Dataset.from_generator(
            lambda: ({"image": row[image], "label": row.get(label)} for row in rows),
            features=datasets.Features({"image": features, "label": datasets.Value("int64")}),
            cache_dir=self._folder.name,
            fingerprint=Path(self._folder.name).name,
        )
        named = (rows.features or {}).get(label)
        if isinstance(named, datasets.ClassLabel):
            self.class_names = names or named.names
        self._labels: list[int | None] = self.rows["label"][:]  # by column: a row would include its image

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int) -> Image.Image:
        value = self.rows[index]["image"]
        with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        return str(self.rows[index]["image"].get("path") or f"row {index}")

    def label(self, index: int) -> int | None:
        return self._labels[index]
